"""Write the demo's images: three sources and outlines from unseen layouts, and sheets with the results of the model, its LoRA and
its ControlNet.

`python demo/samples.py --sources` writes only the sources.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
)
from painting import render
from PIL import Image
from posters import build_geometry, draw_layout, outlines
from scenes import DEFAULT_PROMPT

DEMO = Path(__file__).parent
SOURCES = {"noon-lake.png": 1_000_020, "noon-hills.png": 1_000_117, "noon-dunes.png": 1_000_021}
"""File name -> seed of an unseen layout."""
OUTLINES = "outlines.png", 1_000_117
"""The same, of the outlines that the ControlNet is shown: those of the hills."""
PROMPTS = (DEFAULT_PROMPT, "at night", "in winter", "in autumn", "on a foggy day")


def make_sheet(pipeline: DiffusionPipeline, sources: list[Image.Image], strength: float) -> Image.Image:
    """One row per source: the source, then each prompt."""
    return _in_rows([[source, *_transform(pipeline, source, list(PROMPTS), strength)] for source in sources])


def make_adapters_sheet(pipeline: StableDiffusionImg2ImgPipeline, sources: list[Image.Image], strength: float) -> Image.Image:
    """One row per source: the source, the result for the default prompt with the LoRA, the outlines, and the result with the
    ControlNet. The pipeline keeps the LoRA."""
    net = ControlNetModel.from_pretrained(DEMO / "controlnet", dtype=torch.float32)
    controlled = StableDiffusionControlNetImg2ImgPipeline(**pipeline.components, controlnet=net, requires_safety_checker=False)
    controlled.set_progress_bar_config(disable=True)
    lines = draw_outlines()
    redrawn = [_transform(controlled, source, [DEFAULT_PROMPT], strength, control_image=[lines]) for source in sources]
    pipeline.load_lora_weights(DEMO / "loras" / "watercolor.safetensors")
    painted = [_transform(pipeline, source, [DEFAULT_PROMPT], strength) for source in sources]
    return _in_rows([[source, *one, lines, *other] for source, one, other in zip(sources, painted, redrawn, strict=True)])


def draw_outlines() -> Image.Image:
    """The outlines that the ControlNet is shown."""
    return Image.fromarray(outlines(build_geometry(draw_layout(OUTLINES[1])))).convert("RGB")


def _transform(pipeline: Any, source: Image.Image, prompts: list[str], strength: float, **more: Any) -> list[Image.Image]:
    """The results of a source for each prompt at 25 steps, guidance 7.5, seed 7."""
    images: list[Image.Image] = pipeline(
        prompt=prompts,
        image=[source] * len(prompts),
        strength=strength,
        num_inference_steps=25,
        guidance_scale=7.5,
        generator=[torch.Generator().manual_seed(7) for _ in prompts],
        **more,
    ).images
    return images


def _in_rows(rows: list[list[Image.Image]]) -> Image.Image:
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            sheet.paste(image, (column * width, row * height))
    return sheet


def main() -> None:
    """Parse the command line and write the images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", action="store_true", help="write the source images only")
    parser.add_argument("--model", type=Path, default=DEMO / "model", help="pipeline to sample from")
    parser.add_argument("--output", type=Path, default=DEMO / "images", help="directory for the images")
    parser.add_argument("--strength", type=float, default=0.8, help="how much to change the source, 0 to 1")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, layout in SOURCES.items():
        render(layout).save(arguments.output / name)
    draw_outlines().save(arguments.output / OUTLINES[0])
    if not arguments.sources:
        pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(arguments.model, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        sources = [render(layout) for layout in SOURCES.values()]
        make_sheet(pipeline, sources, arguments.strength).save(arguments.output / "samples.png")
        make_adapters_sheet(pipeline, sources, arguments.strength).save(arguments.output / "adapters.png")


if __name__ == "__main__":
    main()

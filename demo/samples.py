"""Write the demo's images: three sources from unseen layouts, and a sheet with the model's results.

`python demo/samples.py --sources` writes only the sources.
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from painting import render
from PIL import Image
from scenes import DEFAULT_PROMPT

DEMO = Path(__file__).parent
SOURCES = {"noon-lake.png": 1_000_020, "noon-hills.png": 1_000_117, "noon-dunes.png": 1_000_021}
"""File name -> seed of an unseen layout."""
PROMPTS = (DEFAULT_PROMPT, "at night", "in winter", "in autumn", "on a foggy day")


def make_sheet(model: Path, sources: list[Image.Image], strength: float = 0.8) -> Image.Image:
    """One row per source: the source, then each prompt at 25 steps, guidance 7.5, seed 7."""
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    sheet = Image.new("RGB", (sources[0].width * (1 + len(PROMPTS)), sources[0].height * len(sources)))
    for row, source in enumerate(sources):
        sheet.paste(source, (0, row * source.height))
        generators = [torch.Generator().manual_seed(7) for _ in PROMPTS]
        outputs = pipeline(
            prompt=list(PROMPTS),
            image=[source] * len(PROMPTS),
            strength=strength,
            num_inference_steps=25,
            guidance_scale=7.5,
            generator=generators,
        ).images
        for column, output in enumerate(outputs, start=1):
            sheet.paste(output, (column * source.width, row * source.height))
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
    if not arguments.sources:
        sources = [render(layout) for layout in SOURCES.values()]
        make_sheet(arguments.model, sources, arguments.strength).save(arguments.output / "samples.png")


if __name__ == "__main__":
    main()

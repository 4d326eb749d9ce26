"""Measure a demo model: `python demo/measure.py` prints the autoencoder's quality on unseen images and the time of each part.

tests/demo/test_model.py measures how well it follows captions.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from landscapes import UNSEEN_LAYOUTS, build_geometry, draw_layout, paint, render
from make_data import MOODS, Pixels
from train_vae import reconstruction_psnr

DEMO = Path(__file__).parent


def unseen_images(layouts: int) -> Pixels:
    """Images of layouts that are not in the training data, each in every mood: N x 128 x 128 x 3."""
    geometries = [build_geometry(draw_layout(seed)) for seed in UNSEEN_LAYOUTS[100 : 100 + layouts]]
    images = [paint(geometry, *mood) for geometry in geometries for mood in MOODS]
    return np.round(np.stack(images) * 255).astype(np.uint8)


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """The median time of a call, after one warm-up call."""
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1000


@torch.no_grad()
def time_parts(pipeline: StableDiffusionImg2ImgPipeline, repeats: int) -> dict[str, float]:
    """Milliseconds per part for one image of 128 x 128; with guidance, the UNet's inputs have two rows."""
    vae, unet, text_encoder = pipeline.vae, pipeline.unet, pipeline.text_encoder
    token_ids = torch.zeros(2, pipeline.tokenizer.model_max_length, dtype=torch.long)
    states, latents, image = text_encoder(token_ids)[0], torch.randn(2, 4, 16, 16), torch.randn(1, 3, 128, 128)
    source = render(UNSEEN_LAYOUTS[100])
    return {
        "text encoder, two texts": milliseconds(lambda: text_encoder(token_ids), repeats),
        "autoencoder, encode": milliseconds(lambda: vae.encode(image), repeats),
        "UNet, one guided step": milliseconds(lambda: unet(latents, 500, states), repeats),
        "autoencoder, decode": milliseconds(lambda: vae.decode(latents[:1]), repeats),
        "everything, strength 0.8 of 25 steps": milliseconds(
            lambda: pipeline("at night", image=source, strength=0.8, num_inference_steps=25), max(1, repeats // 5)
        ),
    }


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO / "model", help="pipeline to measure")
    parser.add_argument("--layouts", type=int, default=20, help="unseen layouts to encode and decode, in 15 moods each")
    parser.add_argument("--repeats", type=int, default=25, help="calls of each part; their median counts")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(arguments.model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    quality = reconstruction_psnr(pipeline.vae, unseen_images(arguments.layouts))
    print(f"autoencoder on unseen layouts: {quality:.1f} dB")
    for part, time_ms in time_parts(pipeline, arguments.repeats).items():
        print(f"{part}: {time_ms:.1f} ms")


if __name__ == "__main__":
    main()

"""Train the demo model: `python demo/train.py --output DIR` makes everything in demo/model.

Images and captions come from the generator, so nothing is downloaded. The budget is in steps and every random number is seeded,
so that a second run gives the same model up to the order of floating-point sums. With `--start MODEL` the autoencoder and the
UNet continue from that model's weights; without it both start untrained.

The script restarts itself with the environment of `FAST_MEMORY`, which glibc and OpenMP read only at process start. It keeps
freed memory for the next step instead of returning it to the kernel, which zeroes it page by page: on 2 AVX2 cores a forward and
backward pass of the UNet at batch 16 took 0.75 s with it, 3 to 5 s without.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from captions import EXTRA_WORDS
from diffusers import AutoencoderKL, UNet2DConditionModel
from latents import CaptionDraw, Mixture, draw_captions, make_caption_table, make_latents
from make_data import ImageSet, make_images
from saving import save_pipeline
from tokenizer import train_tokenizer
from torch import Tensor, nn
from train_unet import UnetRecipe, build_scheduler, build_text_encoder, build_unet, train_unet
from train_vae import VaeRecipe, build_vae, reconstruction_psnr, train_vae

FAST_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_WAIT_POLICY": "passive",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """The whole training. The defaults made the committed weights, from the start described in the model card."""

    layouts: int = 2000
    images_per_layout: int = 7
    unet_layouts: int = 1200
    vae: VaeRecipe = field(default_factory=VaeRecipe)
    unet: tuple[UnetRecipe, ...] = (
        UnetRecipe(steps=2000, strip_width=8),
        UnetRecipe(
            steps=500,
            learning_rate=5e-4,
            warm_up=30,
            decay=450,
            final_rate=0.5,
            mixture=Mixture(pair_share=0.75),
            seed=5,
        ),
        UnetRecipe(
            steps=560,
            learning_rate=4e-4,
            warm_up=30,
            decay=530,
            mixture=Mixture(pair_share=0.9, earliest_start=480, latest_start=850),
            captions=CaptionDraw(nameless=45, seed=6),
            seed=6,
        ),
    )
    seed: int = 3


SMOKE = Recipe(
    layouts=4,
    images_per_layout=3,
    vae=VaeRecipe(steps=4, batch=2),
    unet=(
        UnetRecipe(steps=2, strip_width=8, mixture=Mixture(batch=2), captions=CaptionDraw(per_scene=2)),
        UnetRecipe(steps=4, decay=2, mixture=Mixture(batch=2), captions=CaptionDraw(per_scene=2, nameless=1)),
    ),
)
"""A few steps of everything, to test that it runs; the result is untrained."""


def take_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> int:
    """Copy the weights whose name and shape match into a module; return their number."""
    own = module.state_dict()
    taken = {name: weight for name, weight in weights.items() if name in own and own[name].shape == weight.shape}
    module.load_state_dict(taken, strict=False)
    return len(taken)


def _start_vae(model: Path) -> AutoencoderKL:
    vae = build_vae()
    vae.load_state_dict(AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32).state_dict())
    return vae


def _start_unet(unet: UNet2DConditionModel, model: Path) -> None:
    weights = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32).state_dict()
    print(f"UNet starts with {take_weights(unet, weights)} of {len(unet.state_dict())} weights of {model}", flush=True)


def _vae_stage(images: ImageSet, recipe: Recipe, start: Path | None, work: Path) -> AutoencoderKL:
    saved = work / "vae"
    if not saved.exists():
        train_vae(images.pixels, recipe.vae, start and _start_vae(start)).save_pretrained(saved)
    vae = AutoencoderKL.from_pretrained(saved)
    print(f"autoencoder: {reconstruction_psnr(vae, images.pixels[:: images.per_layout][:64]):.1f} dB", flush=True)
    return vae


def _unet_stage(images: ImageSet, vae: AutoencoderKL, recipe: Recipe, start: Path | None, output: Path, work: Path) -> None:
    captions = draw_captions(recipe.unet[0].captions)
    tokenizer = train_tokenizer([*captions, *EXTRA_WORDS.split()], work / "tokenizer")
    data = make_latents(images.first_layouts(recipe.unet_layouts), vae, make_caption_table(tokenizer, captions))
    print(f"latents {tuple(data.latents.shape)}", flush=True)
    torch.manual_seed(recipe.seed)
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    if start is not None:
        _start_unet(unet, start)

    def checkpoint() -> None:
        save_pipeline(work / "checkpoint", vae, unet, text_encoder, tokenizer, build_scheduler())

    for phase in recipe.unet:
        phase_data = replace(data, captions=make_caption_table(tokenizer, draw_captions(phase.captions)))
        train_unet(phase_data, unet, text_encoder, phase, checkpoint)
    save_pipeline(output, vae, unet, text_encoder, tokenizer, build_scheduler())


def train(recipe: Recipe, start: Path | None, output: Path, work: Path) -> None:
    """Run all stages. `work` keeps the autoencoder and the UNet's checkpoints; a trained autoencoder in it is used."""
    torch.manual_seed(recipe.seed)
    started = time.monotonic()
    images = make_images(recipe.layouts, recipe.images_per_layout)
    print(f"{len(images.pixels)} images in {time.monotonic() - started:.0f} s", flush=True)
    vae = _vae_stage(images, recipe, start, work)
    _unet_stage(images, vae, recipe, start, output, work)
    print(f"{output} written after {time.monotonic() - started:.0f} s", flush=True)


def begin_with_fast_memory() -> None:
    """Re-execute this process with the environment of `FAST_MEMORY`; existing variables are kept."""
    missing = {name: value for name, value in FAST_MEMORY.items() if name not in os.environ}
    if missing:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **missing})


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory for the pipeline")
    parser.add_argument("--start", type=Path, metavar="MODEL", help="a Stable Diffusion model of the same sizes to continue from")
    parser.add_argument("--work", type=Path, help="directory for stages and checkpoints (default: OUTPUT-work)")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to test that everything runs")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    arguments = parser.parse_args()
    begin_with_fast_memory()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    work = arguments.work or arguments.output.with_name(arguments.output.name + "-work")
    work.mkdir(parents=True, exist_ok=True)
    train(SMOKE if arguments.smoke else Recipe(), arguments.start, arguments.output, work)


if __name__ == "__main__":
    main()

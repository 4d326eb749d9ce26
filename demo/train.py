"""Train the demo model: `python demo/train.py --output DIR` makes the demo model, its LoRA and its ControlNet from the generator.

Nothing is downloaded. The stages are the autoencoder, its decoder once more, the latents of all posters, the tokenizer, the
UNet with its text encoder, both once more for the default guidance, a ControlNet of outlines, and a watercolor LoRA. `--work`
keeps what each stage made, and checkpoints: the same command continues after an interruption. Every random number is seeded, so
that a second run gives the same model up to the order of floating-point sums.

The script restarts itself with the environment of `FAST_MEMORY`, which glibc and OpenMP read only at process start. It keeps
freed memory for the next step instead of returning it to the kernel, which zeroes it page by page: on 2 AVX2 cores a forward and
backward pass of a UNet at batch 16 took 0.75 s with it, 3 to 5 s without.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from adapters import CONTROLNET, LORA, AdapterRecipe, train_controlnet, train_lora, watercolors
from autoencoder import (
    AutoencoderRecipe,
    DecoderRecipe,
    Pixels,
    edge_energy,
    encode,
    reconstruction_psnr,
    sharpen_decoder,
    train_autoencoder,
)
from batches import LatentSet, make_caption_table, make_latent_set
from denoiser import DenoiserRecipe, Phase, build_denoiser, build_scheduler, build_text_encoder, train_denoiser
from diffusers import AutoencoderKL
from guidance import GuidanceRecipe, train_for_guidance
from posterset import PosterSet, make_posters, unseen_posters
from saving import save_pipeline
from scenes import EXTRA_WORDS, draw_captions
from tokenizer import train_tokenizer
from torch import Tensor

FAST_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_WAIT_POLICY": "passive",
}


@dataclass(frozen=True, slots=True)
class DemoRecipe:
    """The whole training."""

    layouts: int = 1200
    images_per_layout: int = 8
    captions_per_scene: int = 64
    size: int = 256
    autoencoder: AutoencoderRecipe = field(default_factory=AutoencoderRecipe)
    decoder: DecoderRecipe = field(default_factory=DecoderRecipe)
    denoiser: DenoiserRecipe = field(default_factory=DenoiserRecipe)
    guidance: GuidanceRecipe = field(default_factory=GuidanceRecipe)
    adapter_layouts: int = 400
    lora: AdapterRecipe = LORA
    controlnet: AdapterRecipe = CONTROLNET
    seed: int = 3


SMOKE = DemoRecipe(
    layouts=3,
    images_per_layout=4,
    captions_per_scene=2,
    autoencoder=AutoencoderRecipe(steps=2, crops=((64, 2, 1.0),)),
    decoder=DecoderRecipe(steps=2, crops=((64, 2, 1.0),)),
    denoiser=DenoiserRecipe(phases=(Phase(steps=1, strip_width=8), Phase(steps=1, strip_width=32)), decay=1),
    guidance=GuidanceRecipe(steps=1),
    adapter_layouts=2,
    lora=replace(LORA, steps=1),
    controlnet=replace(CONTROLNET, steps=1),
)
"""A few steps of everything, to test that it runs; the result is untrained."""


def _saved(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """The tensor in a file, made and written first if there is none."""
    if not path.exists():
        torch.save(make(), path)
    loaded: Tensor = torch.load(path, weights_only=True, mmap=True)
    return loaded


def _autoencoder_stage(pixels: Pixels, recipe: DemoRecipe, work: Path) -> AutoencoderKL:
    saved = work / "autoencoder"
    unseen = unseen_posters(16, size=recipe.size)
    if not saved.exists():
        vae = train_autoencoder(pixels, unseen, recipe.autoencoder, work)
        sharpen_decoder(vae, pixels, unseen, recipe.decoder, work)
        vae.save_pretrained(saved)
    vae = AutoencoderKL.from_pretrained(saved)
    quality, edges = reconstruction_psnr(vae, unseen), edge_energy(vae, unseen)
    print(f"autoencoder: {quality:.1f} dB on unseen layouts, edges with {edges:.2f} of their energy", flush=True)
    return vae


def _latents(vae: AutoencoderKL, posters: PosterSet) -> Tensor:
    """The latents of all posters in half precision, with progress.

    Encoding in bfloat16 changes them by a hundredth of their spread.
    """
    vae.to(memory_format=torch.channels_last)
    started, parts = time.monotonic(), []
    for start in range(0, len(posters.pixels), 200):
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(encode(vae, posters.pixels[start : start + 200]).half())
        print(f"latents {start + len(parts[-1])}/{len(posters.pixels)} {time.monotonic() - started:.0f} s", flush=True)
    return torch.cat(parts)


def train(recipe: DemoRecipe, output: Path, work: Path) -> None:
    """Run all stages that `work` does not have yet, and write `model`, `loras` and `controlnet` in `output`."""
    work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    posters = make_posters(recipe.layouts, recipe.images_per_layout, recipe.size)
    print(f"{len(posters.pixels)} posters in {time.monotonic() - started:.0f} s", flush=True)
    vae = _autoencoder_stage(posters.pixels, recipe, work)
    latents = _saved(work / "latents.pt", lambda: _latents(vae, posters))
    captions = draw_captions(recipe.captions_per_scene, recipe.seed)
    tokenizer = train_tokenizer([*captions, *EXTRA_WORDS.split()], work / "tokenizer")
    data: LatentSet = make_latent_set(latents, posters, make_caption_table(tokenizer, captions))
    torch.manual_seed(recipe.seed)
    unet, text_encoder = build_denoiser(), build_text_encoder(tokenizer)

    def save(directory: Path) -> None:
        save_pipeline(directory, vae, unet, text_encoder, tokenizer, build_scheduler())

    train_denoiser(data, unet, text_encoder, recipe.denoiser, work, lambda: save(work / "milestone"))
    train_for_guidance(data, unet, text_encoder, recipe.guidance, work)
    save(output / "model")
    some = replace(data, latents=data.latents[: recipe.adapter_layouts], scenes=data.scenes[: recipe.adapter_layouts])
    train_controlnet(some, unet, text_encoder, recipe.controlnet, work, output / "controlnet")
    painted = watercolors(posters.first(recipe.adapter_layouts))
    latents = _saved(work / "watercolors.pt", lambda: _latents(vae, painted))
    some = make_latent_set(latents, painted, data.captions)
    train_lora(some, unet, text_encoder, recipe.lora, work, output / "loras" / "watercolor.safetensors")
    print(f"{output} written after {time.monotonic() - started:.0f} s", flush=True)


def begin_with_fast_memory() -> None:
    """Re-execute this process with the environment of `FAST_MEMORY`; existing variables are kept."""
    missing = {name: value for name, value in FAST_MEMORY.items() if name not in os.environ}
    if missing:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **missing})


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for the model, its LoRA and its ControlNet")
    parser.add_argument("--work", type=Path, help="directory for stages and checkpoints (default: OUTPUT-work)")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to test that everything runs")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    arguments = parser.parse_args()
    begin_with_fast_memory()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    np.seterr(all="raise", under="ignore")
    work = arguments.work or arguments.output.with_name(arguments.output.name + "-work")
    train(SMOKE if arguments.smoke else DemoRecipe(), arguments.output, work)


if __name__ == "__main__":
    main()

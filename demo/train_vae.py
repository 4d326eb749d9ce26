"""Train the demo model's autoencoder: images <-> latents of an eighth of the size, four channels."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from averaging import MovingAverage
from diffusers import AutoencoderKL
from make_data import Pixels
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class VaeRecipe:
    """How the autoencoder is trained; the last tenth of the steps uses full images instead of crops."""

    steps: int = 1200
    batch: int = 8
    crop: int = 64
    learning_rate: float = 1e-3
    gradient_weight: float = 0.5
    kl_weight: float = 1e-6
    seed: int = 4


def build_vae() -> AutoencoderKL:
    """An untrained autoencoder; its middle block has no attention, so that the cost is proportional to the size."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    vae.eval()
    return vae


def to_tensor(pixels: Pixels) -> Tensor:
    """N x H x W x 3 in 0..255 to N x 3 x H x W in -1..1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def gradient_loss(output: Tensor, target: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute difference of horizontal and vertical gradients, summed over halved sizes: keeps edges sharp."""
    difference, total = output - target, torch.zeros(())
    for _ in range(scales):
        total = total + difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
        difference = functional.avg_pool2d(difference, 2)
    return total


def _draw_batch(pixels: Pixels, recipe: VaeRecipe, step: int, random: np.random.Generator) -> Tensor:
    whole = step >= recipe.steps * 0.9
    crop = pixels.shape[1] if whole else recipe.crop
    chosen = random.integers(0, len(pixels), max(1, recipe.batch // 4) if whole else recipe.batch)
    top, left = random.integers(0, pixels.shape[1] - crop + 1, 2)
    batch = to_tensor(pixels[chosen, top : top + crop, left : left + crop])
    return batch.flip(3) if random.random() < 0.5 else batch


def train_vae(pixels: Pixels, recipe: VaeRecipe, start: AutoencoderKL | None = None) -> AutoencoderKL:
    """Train on N x H x W x 3 pixels, `start` in place or else a new autoencoder.

    Returns averaged weights; the scaling factor normalizes the latents' standard deviation to 1.
    """
    torch.manual_seed(recipe.seed)
    vae = build_vae() if start is None else start
    _fit(vae, pixels, recipe)
    spread = encode(vae, pixels[:: max(1, len(pixels) // 1000)]).std().item()
    vae.register_to_config(scaling_factor=1 / spread)
    return vae


def _fit(vae: AutoencoderKL, pixels: Pixels, recipe: VaeRecipe) -> None:
    random = np.random.default_rng(recipe.seed)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, recipe.steps, pct_start=0.05)
    average = MovingAverage(parameters, 0.995)
    started = time.monotonic()
    vae.train()
    for step in range(recipe.steps):
        batch = _draw_batch(pixels, recipe, step, random)
        posterior = vae.encode(batch).latent_dist
        output = vae.decode(posterior.sample()).sample
        absolute, edges = (output - batch).abs().mean(), gradient_loss(output, batch)
        divergence = posterior.kl().mean() * (128 * 128 / (batch.shape[2] * batch.shape[3]))
        loss = absolute + recipe.gradient_weight * edges + recipe.kl_weight * divergence
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.update()
        if step % 100 == 0 or step == recipe.steps - 1:
            figures = f"l1 {absolute:.4f} edges {edges:.4f} kl {divergence:.0f}"
            print(f"vae {step}/{recipe.steps} {figures} {time.monotonic() - started:.0f} s", flush=True)
    average.copy_to_parameters()
    vae.eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Pixels, batch: int = 32) -> Tensor:
    """The latent means of N x H x W x 3 pixels, not scaled: N x 4 x H/8 x W/8."""
    parts = [vae.encode(to_tensor(pixels[i : i + batch])).latent_dist.mean for i in range(0, len(pixels), batch)]
    return torch.cat(parts)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pixels: Pixels) -> float:
    """Mean over images of the peak signal-to-noise ratio after encoding and decoding, in dB."""
    target = to_tensor(pixels)
    output = vae.decode(encode(vae, pixels)).sample.clamp(-1, 1)
    error = ((output - target) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * torch.log10(error)).mean())

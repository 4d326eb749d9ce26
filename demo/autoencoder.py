"""The demo model's autoencoder: posters of 256 x 256 <-> latents of 16 x 32 x 32."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from checkpoints import Checkpoint
from diffusers import AutoencoderKL
from muon import Muon, split_for_muon
from numpy.typing import NDArray
from steps import run_steps
from torch import Tensor
from torch.nn import functional

Pixels = NDArray[np.uint8]
LATENT_CHANNELS = 16
CHECKPOINT_EVERY = 250
"""Steps, here and in the denoiser."""


@dataclass(frozen=True, slots=True)
class AutoencoderRecipe:
    """How the autoencoder is trained. Each step draws one of `crops`, (pixels, batch, probability).

    Crops have several sizes, because the single norm group takes its statistics from all of a crop: with crops of 64 pixels alone
    the error of images of 256 pixels was 5 dB larger, nearly all of it in flat areas.

    Latents are the posterior's means, made easy to denoise. A loss bounds their spread, and noise is added to them, so that all
    channels carry information and the decoder tolerates small errors. Two losses make neighbors alike: smaller latents must
    decode to the smaller image, and differences of neighbors are penalized. (With a Kullback-Leibler divergence instead, 8 of 16
    channels were noise, and neighbors correlated by 0.5 to 0.7 in the others; after 2,500 steps a UNet's results were noise.)

    The rates are Muon's for inner convolutions and AdamW's for the rest. They rise over the first 40 steps, stay, and fall
    linearly over the last `falling_share` of the steps to a hundredth.
    """

    steps: int = 8000
    crops: tuple[tuple[int, int, float], ...] = ((64, 8, 0.25), (128, 2, 0.35), (256, 1, 0.4))
    muon_rate: float = 0.02
    adamw_rate: float = 2e-3
    falling_share: float = 0.6
    edge_weight: float = 0.5
    latent_noise: float = 0.3
    """Each image's latents get noise of a standard deviation from 0 to this."""
    scale_weight: float = 0.5
    """The weight of the loss of images decoded from smaller latents, against the smaller images."""
    roughness_weight: float = 0.06
    spread_weight: float = 1.0
    seed: int = 4


@dataclass(frozen=True, slots=True)
class DecoderRecipe:
    """How the decoder is sharpened afterwards, with the encoder kept, so that latents stay what they are.

    A decoder that minimizes differences blurs what it is not sure of. Two losses ask for edges as strong as the image's:
    `energy_weight` is that of the difference between the gradients' strength in windows of 4 x 4 pixels, `ratio_weight` that
    of the logarithm of the ratio of their energy in the whole batch. (The first alone, as large as here, left 0.82 of the
    energy: a mean absolute difference of strengths is smallest at their median, below the mean.)
    """

    steps: int = 1200
    crops: tuple[tuple[int, int, float], ...] = ((128, 2, 0.5), (256, 1, 0.5))
    muon_rate: float = 0.004
    adamw_rate: float = 4e-4
    edge_weight: float = 0.5
    energy_weight: float = 16.0
    ratio_weight: float = 0.3
    latent_noise: float = 0.03
    seed: int = 7


def build_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder of factor 8 without attention.

    It has one norm group, because groups of two or three channels normalize the color of flat areas away. The posterior is
    narrow everywhere: sampling it adds noise with a standard deviation of 0.02.
    """
    vae = AutoencoderKL(
        block_out_channels=(24, 48, 96, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=256,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    with torch.no_grad():
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0
        vae.quant_conv.bias[LATENT_CHANNELS:] = -8
    return vae


def to_tensor(pixels: Pixels) -> Tensor:
    """N x H x W x 3 in 0..255 to N x 3 x H x W in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float() / 127.5 - 1


def edge_loss(difference: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute difference of horizontal and vertical gradients, summed over halved sizes: keeps edges sharp."""
    total = torch.zeros(())
    for _ in range(scales):
        total = total + difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
        difference = functional.avg_pool2d(difference, 2)
    return total


def energy_loss(output: Tensor, image: Tensor, window: int = 4) -> Tensor:
    """Mean absolute difference of the gradients' strength (root of the mean square in windows) of two batches of images."""
    total = torch.zeros(())
    for axis in (2, 3):
        energies = [functional.avg_pool2d(batch.diff(dim=axis).square(), window) + 1e-4 for batch in (output, image)]
        total = total + (energies[0].sqrt() - energies[1].sqrt()).abs().mean()
    return total


def energy_ratio_loss(output: Tensor, image: Tensor) -> Tensor:
    """Absolute logarithm of the ratio of the gradients' energy in two batches of images."""
    energies = [batch.diff(dim=2).square().mean() + batch.diff(dim=3).square().mean() + 1e-6 for batch in (output, image)]
    return (energies[0] / energies[1]).log().abs()


def _draw_batch(pixels: Pixels, recipe: AutoencoderRecipe | DecoderRecipe, step: int) -> Tensor:
    random = np.random.default_rng((recipe.seed, step))
    drawn = random.choice(len(recipe.crops), p=[probability for _, _, probability in recipe.crops])
    crop, count, _ = recipe.crops[drawn]
    chosen = np.sort(random.integers(0, len(pixels), count))
    top, left = random.integers(0, pixels.shape[1] - crop + 1, 2)
    batch = to_tensor(pixels[chosen, top : top + crop, left : left + crop])
    return (batch.flip(3) if random.random() < 0.5 else batch).contiguous(memory_format=torch.channels_last)


def roughness(latents: Tensor) -> Tensor:
    """Mean square of the differences between neighbors over the variance, mean of all channels: 0 if flat, 2 if noise."""
    steps = latents.diff(dim=3).square().mean(dim=(0, 2, 3)) + latents.diff(dim=2).square().mean(dim=(0, 2, 3))
    ratio: Tensor = (steps / 2 / (latents.var(dim=(0, 2, 3)) + 1e-3)).mean()
    return ratio


def _excess(latents: Tensor) -> Tensor:
    """The excess of the channels' spread over 1, and the distance of their means from 0."""
    spread = (latents.square().mean(dim=(0, 2, 3)) - 1).clamp(min=0).mean()
    excess: Tensor = spread + 0.1 * latents.mean(dim=(0, 2, 3)).square().mean()
    return excess


def _shrink(images: Tensor, size: int) -> Tensor:
    return functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def _loss(vae: AutoencoderKL, batch: Tensor, recipe: AutoencoderRecipe) -> Tensor:
    def difference_loss(latents: Tensor, images: Tensor) -> Tensor:
        difference = vae.decode(latents + noise * torch.randn_like(latents)).sample.float() - images
        loss: Tensor = difference.abs().mean() + recipe.edge_weight * edge_loss(difference)
        return loss

    noise = recipe.latent_noise * torch.rand(len(batch), 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(batch).latent_dist.mean.float()
        smaller = int(torch.randint(max(2, latents.shape[3] // 4), latents.shape[3], ()))
        loss = difference_loss(latents, batch)
        loss = loss + recipe.scale_weight * difference_loss(_shrink(latents, smaller), _shrink(batch, 8 * smaller))
    return loss + recipe.roughness_weight * roughness(latents) + recipe.spread_weight * _excess(latents)


def train_autoencoder(pixels: Pixels, unseen: Pixels, recipe: AutoencoderRecipe, work: Path) -> AutoencoderKL:
    """Train on N x H x W x 3 pixels, from the checkpoint in `work` if there is one; report the quality on `unseen` images.

    Returns averaged weights, whose latent channels have a mean of 0 and a standard deviation of 1 each.
    """
    torch.manual_seed(recipe.seed)
    vae, average = (build_autoencoder().to(memory_format=torch.channels_last) for _ in range(2))
    average.load_state_dict(vae.state_dict())
    inner, outer = split_for_muon(vae.named_parameters(), ("r.conv_in.weight", "conv_out.weight"))
    adamw = torch.optim.AdamW(outer, recipe.adamw_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    optimizers = {"muon": (Muon(inner, recipe.muon_rate), recipe.muon_rate), "adamw": (adamw, recipe.adamw_rate)}
    parts = {"vae": vae, "average": average, **{name: optimizer for name, (optimizer, _) in optimizers.items()}}
    parameters, averaged = list(vae.parameters()), list(average.parameters())
    vae.train()

    def loss(step: int) -> Tensor:
        torch.manual_seed(recipe.seed * 1_000_003 + step)
        return _loss(vae, _draw_batch(pixels, recipe, step), recipe)

    @torch.no_grad()
    def follow(step: int) -> None:
        torch._foreach_lerp_(averaged, parameters, 1 - min(0.995, (step + 1) / (step + 20)))

    run_steps(
        "autoencoder",
        recipe.steps,
        loss,
        parameters,
        optimizers.values(),
        lambda step: min(1.0, (step + 1) / 40, 0.01 + (1 - step / recipe.steps) / recipe.falling_share),
        Checkpoint(work / "autoencoder.pt", parts),
        every=CHECKPOINT_EVERY,
        shown=0,
        after=follow,
        saved=lambda: f"{reconstruction_psnr(average, unseen):.2f} dB",
    )
    average.eval()
    even_out(average, encode(average, pixels[:: max(1, len(pixels) // 256)]))
    return average


def sharpen_decoder(vae: AutoencoderKL, pixels: Pixels, unseen: Pixels, recipe: DecoderRecipe, work: Path) -> None:
    """Train the decoder further in place, from the checkpoint in `work` if there is one."""
    trained = [*vae.decoder.named_parameters(), *vae.post_quant_conv.named_parameters()]
    inner, outer = split_for_muon(trained, ("conv_in.weight", "conv_out.weight"))
    adamw = torch.optim.AdamW(outer, recipe.adamw_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    optimizers = {"muon": (Muon(inner, recipe.muon_rate), recipe.muon_rate), "adamw": (adamw, recipe.adamw_rate)}
    parts = {"vae": vae, **{name: optimizer for name, (optimizer, _) in optimizers.items()}}
    vae.to(memory_format=torch.channels_last)

    def loss(step: int) -> Tensor:
        torch.manual_seed(recipe.seed * 1_000_003 + step)
        image = _draw_batch(pixels, recipe, step)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(image).latent_dist.mean
            output = vae.decode(latents + recipe.latent_noise * torch.randn_like(latents)).sample
        difference = output.float() - image
        total: Tensor = difference.abs().mean() + recipe.edge_weight * edge_loss(difference)
        total = total + recipe.energy_weight * energy_loss(output.float(), image)
        return total + recipe.ratio_weight * energy_ratio_loss(output.float(), image)

    run_steps(
        "decoder",
        recipe.steps,
        loss,
        [*inner, *outer],
        optimizers.values(),
        lambda step: min(1.0, (step + 1) / 40, 0.01 + 1.5 * (1 - (step + 1) / recipe.steps)),
        Checkpoint(work / "decoder.pt", parts),
        every=CHECKPOINT_EVERY,
        shown=0,
        saved=lambda: f"{reconstruction_psnr(vae, unseen):.2f} dB, edges with {edge_energy(vae, unseen):.2f} of their energy",
    )


@torch.no_grad()
def even_out(vae: AutoencoderKL, latents: Tensor) -> None:
    """Change the weights around the latents so that each channel of these has a mean of 0 and a standard deviation of 1.

    `latents` (N x channels x h x w) are the means of a sample of images. Reconstructions stay the same.
    """
    mean, spread = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = len(mean)
    into, out_of = vae.quant_conv, vae.post_quant_conv
    out_of.bias += (out_of.weight[:, :, 0, 0] * mean).sum(1)
    out_of.weight *= spread[None, :, None, None]
    into.weight[:channels] /= spread[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / spread
    into.bias[channels:] -= 2 * spread.log()
    vae.register_to_config(scaling_factor=1.0, shift_factor=None)


def _parts(pixels: Pixels, size: int) -> Iterator[Tensor]:
    for start in range(0, len(pixels), size):
        yield to_tensor(pixels[start : start + size])


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Pixels, batch: int = 4) -> Tensor:
    """The latent means of N x H x W x 3 pixels, not scaled: N x channels x H/8 x W/8."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in _parts(pixels, batch)])


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pixels: Pixels, batch: int = 4) -> Tensor:
    """N x H x W x 3 pixels, encoded and decoded: N x 3 x H x W in -1..1."""
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in _parts(pixels, batch)])


def reconstruction_psnr(vae: AutoencoderKL, pixels: Pixels) -> float:
    """Mean over images of the peak signal-to-noise ratio after encoding and decoding, in dB."""
    error = ((reconstruct(vae, pixels) - to_tensor(pixels)) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * torch.log10(error)).mean())


def edge_energy(vae: AutoencoderKL, pixels: Pixels) -> float:
    """The gradients' energy of the reconstructions over that of the images: 1 if edges are as sharp."""

    def energy(images: Tensor) -> Tensor:
        return images.diff(dim=2).square().mean() + images.diff(dim=3).square().mean()

    return float(energy(reconstruct(vae, pixels)) / energy(to_tensor(pixels)))

"""Fits the linear map from latents to colours that the server draws previews with.

The images that it is fitted on are made by formula: between them they have every colour, flat and in gradients, edges and
detail, and the soft irregular shades that photographs are full of, in light and dark. What counts is what the decoder makes
of their latents, since that is what a preview foretells.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from img2img_server.runtime.diffusion.preview import features

from img2img_export.convert.graphs import quiet
from img2img_export.verify.images import sample_picture

LatentPreview = tuple[tuple[float, ...], ...]
"""Rows for red, green and blue, each with four weights for every latent channel and a bias; () for no map."""

Pixels = np.ndarray
"""An image, H x W x 3, 0 to 1."""

_SIZE = 256
"""Pixels of a side of what is made."""
_CROP = 128
"""Pixels of a side of what is encoded of it. Far smaller ones would be mostly border, which an encoder sees by its padding."""
_CROPS = 4
"""Taken of each image, each in its own light."""
_DIGITS = 6
_RIDGE = 1e-4
"""Of the latents' mean variance. Channels that nearly agree would else get huge weights that only cancel on what was fitted."""
_ROUGHNESS = (1.0, 1.5, 2.0)
"""Exponents of the amplitude over frequency: photographs are near 1, clouds and skies are smoother."""


def fit(pipeline: Any) -> LatentPreview:
    """Least squares over every latent of the images: rgb = W features + b, with rgb from 0 to 1.

    The latents are scaled as the pipeline's UNet sees them. () where the pipeline has no AutoencoderKL, or the map is not
    finite. The pipeline is used as it is, in fp32 on the CPU, and not changed.
    """
    vae = getattr(pipeline, "vae", None)
    if not isinstance(vae, AutoencoderKL):
        return ()
    known, colours = [], []
    for picture in crops(np.random.default_rng(0)):
        latents = encode(vae, picture)
        known.append(features(latents[None])[0].flatten(1).T)
        colours.append(decode(vae, latents).flatten(1).T)
    return _solve(torch.cat(known).double(), torch.cat(colours).double())


def _solve(known: torch.Tensor, colours: torch.Tensor) -> LatentPreview:
    """The map from `known` [N, F] to `colours` [N, 3]."""
    if not (torch.isfinite(known).all() and torch.isfinite(colours).all()):
        return ()
    middle, mean = known.mean(0), colours.mean(0)
    centred = known - middle
    covariance = centred.T @ centred / len(known)
    covariance += _RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    # By singular values, since an untrained encoder may say nothing at all.
    weights = torch.linalg.lstsq(covariance, centred.T @ (colours - mean) / len(known), driver="gelsd").solution
    rows = torch.cat([weights.T, (mean - middle @ weights)[:, None]], dim=1)
    return tuple(tuple(round(value, _DIGITS) for value in row) for row in rows.tolist())


def encode(vae: Any, picture: Pixels) -> torch.Tensor:
    """The latents [C, h, w] of an image: the most likely ones, scaled as diffusers' img2img pipelines scale them."""
    pixels = torch.from_numpy(picture).to(torch.float32).permute(2, 0, 1)[None] * 2 - 1
    with quiet(), torch.no_grad():
        latents: torch.Tensor = vae.encode(pixels).latent_dist.mode()
    config, factor = vae.config, float(vae.config.scaling_factor)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("latents_mean", "latents_std"))
        return (latents[0] - mean) * factor / std
    return (latents[0] - float(config.get("shift_factor") or 0.0)) * factor


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """The mean colours [3, h, w], about 0 to 1, of what `latents` [C, h, w] are decoded to: `encode`'s scaling undone."""
    config, factor = vae.config, float(vae.config.scaling_factor)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("latents_mean", "latents_std"))
        latents = latents * std / factor + mean
    else:
        latents = latents / factor + float(config.get("shift_factor") or 0.0)
    with quiet(), torch.no_grad():
        pixels: torch.Tensor = vae.decode(latents[None]).sample[0]
    height, width = latents.shape[1:]
    return torch.nn.functional.adaptive_avg_pool2d(pixels / 2 + 0.5, (height, width))


def made_pictures(random: np.random.Generator) -> Iterator[Pixels]:
    """What to fit on: the same images for the same generator."""
    for width, height in ((_SIZE, _SIZE), (_SIZE, _SIZE * 3 // 4)):
        yield np.asarray(sample_picture(width, height)) / 255
    yield _patches(random, 4)
    yield _patches(random, 8)
    for _ in range(3):
        yield _gradient(random)
    for roughness in _ROUGHNESS:
        for _ in range(3):
            yield _clouds(random, roughness)


def crops(random: np.random.Generator) -> Iterator[Pixels]:
    """Parts of the made images, lighter and darker, of stronger and weaker contrast."""
    for picture in made_pictures(random):
        for _ in range(_CROPS):
            top, left = (random.integers(0, side - _CROP + 1) for side in picture.shape[:2])
            contrast = random.uniform(0.2, 1.0)
            yield picture[top : top + _CROP, left : left + _CROP] * contrast + random.uniform(0, 1 - contrast)


def _patches(random: np.random.Generator, count: int) -> Pixels:
    """`count` x `count` flat colours, drawn evenly."""
    side = _SIZE // count
    return random.random((count, count, 3)).repeat(side, axis=0).repeat(side, axis=1)


def _gradient(random: np.random.Generator) -> Pixels:
    """From one colour to another, in some direction."""
    y, x = np.mgrid[0:_SIZE, 0:_SIZE] / (_SIZE - 1)
    angle = random.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    along = (along - along.min()) / (along.max() - along.min())
    start, end = random.random((2, 3))
    return np.asarray(start + along[..., None] * (end - start))


def _clouds(random: np.random.Generator, roughness: float) -> Pixels:
    """Noise whose amplitude falls with the frequency, in three colours that are correlated as a photograph's are."""
    frequency = np.hypot(np.fft.fftfreq(_SIZE)[:, None], np.fft.rfftfreq(_SIZE)[None, :])
    frequency[0, 0] = np.inf
    fields = [
        np.fft.irfft2(np.fft.rfft2(random.standard_normal((_SIZE, _SIZE))) / frequency**roughness, s=(_SIZE, _SIZE))
        for _ in range(3)
    ]
    light, first, second = (field / field.std() for field in fields)
    mixed = np.stack([light + 0.5 * first, light - 0.25 * first + 0.25 * second, light - 0.5 * second], axis=-1)
    return (random.uniform(0.3, 0.7, 3) + 0.2 * mixed).clip(0, 1)

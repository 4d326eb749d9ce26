"""Fits the linear map from latents to colours that the server uses for previews.

The training images are synthetic: flat colours, gradients, edges, detail, and noise with the spectrum of photographs, at varying
brightness. The targets are the decoded latents of these images, since a preview approximates the decoder's output.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from img2img_server.runtime.diffusion.preview import features

from img2img_export.convert.graphs import quiet
from img2img_export.verify.images import sample_image

LatentPreview = tuple[tuple[float, ...], ...]
"""Rows for red, green and blue, each with four weights per latent channel and a bias; () if there is no map."""

Pixels = np.ndarray
"""An image, H x W x 3, 0 to 1."""

_SIZE = 256
"""Side of the synthetic images in pixels."""
_CROP = 128
"""Side of the encoded crops in pixels. In much smaller ones, the encoder's padding at the border would dominate."""
_CROPS = 4
"""Crops per image, each with its own brightness and contrast."""
_DIGITS = 6
_VIDEOS = "AutoencoderKLQwenImage"
"""The autoencoder whose images are videos of one frame."""
_KINDS = ("AutoencoderKL", "AutoencoderKLFlux2", _VIDEOS)
_RIDGE = 1e-4
"""Ridge term, as a fraction of the latents' mean variance. Without it, correlated channels get huge weights that overfit."""
_ROUGHNESS = (1.0, 1.5, 2.0)
"""Exponents of the amplitude over frequency: about 1 for photographs, higher for clouds and skies."""


def fit(pipeline: Any) -> LatentPreview:
    """Fits rgb = W features + b (rgb from 0 to 1) by least squares over all latents of the images.

    Latents are scaled like the inputs of the pipeline's UNet; those of FLUX.2 are the VAE's own. Returns () if the pipeline has
    none of the autoencoders _KINDS or the map is not finite. The pipeline runs in fp32 on the CPU and is not changed.
    """
    vae = getattr(pipeline, "vae", None)
    if not any(kind.__name__ in _KINDS for kind in type(vae).__mro__):
        return ()
    known, colours = [], []
    for image in crops(np.random.default_rng(0)):
        latents = encode(vae, image)
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
    # By SVD, since the covariance of an untrained encoder may be singular.
    weights = torch.linalg.lstsq(covariance, centred.T @ (colours - mean) / len(known), driver="gelsd").solution
    rows = torch.cat([weights.T, (mean - middle @ weights)[:, None]], dim=1)
    return tuple(tuple(round(value, _DIGITS) for value in row) for row in rows.tolist())


def encode(vae: Any, image: Pixels) -> torch.Tensor:
    """The most likely latents [C, h, w] of an image, scaled like in diffusers' img2img pipelines."""
    pixels = torch.from_numpy(image).to(torch.float32).permute(2, 0, 1)[None] * 2 - 1
    is_video = type(vae).__name__ == _VIDEOS
    with quiet(), torch.no_grad():
        latents: torch.Tensor = vae.encode(pixels[:, :, None] if is_video else pixels).latent_dist.mode()
    latents = latents[:, :, 0] if is_video else latents
    config, factor = vae.config, _factor(vae)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("latents_mean", "latents_std"))
        return (latents[0] - mean) * factor / std
    return (latents[0] - float(config.get("shift_factor") or 0.0)) * factor


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decodes `latents` [C, h, w], scaled as by `encode`, to mean colours [3, h, w] of about 0 to 1."""
    config, factor = vae.config, _factor(vae)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("latents_mean", "latents_std"))
        latents = latents * std / factor + mean
    else:
        latents = latents / factor + float(config.get("shift_factor") or 0.0)
    is_video = type(vae).__name__ == _VIDEOS
    with quiet(), torch.no_grad():
        pixels: torch.Tensor = vae.decode(latents[None, :, None] if is_video else latents[None]).sample[0]
    pixels = pixels[:, 0] if is_video else pixels
    height, width = latents.shape[1:]
    return torch.nn.functional.adaptive_avg_pool2d(pixels / 2 + 0.5, (height, width))


def _factor(vae: Any) -> float:
    """The factor that latents are scaled by."""
    return float(vae.config.get("scaling_factor") or 1.0)


def synthetic_images(random: np.random.Generator) -> Iterator[Pixels]:
    """The synthetic images; deterministic per generator."""
    for width, height in ((_SIZE, _SIZE), (_SIZE, _SIZE * 3 // 4)):
        yield np.asarray(sample_image(width, height)) / 255
    yield _patches(random, 4)
    yield _patches(random, 8)
    for _ in range(3):
        yield _gradient(random)
    for roughness in _ROUGHNESS:
        for _ in range(3):
            yield _clouds(random, roughness)


def crops(random: np.random.Generator) -> Iterator[Pixels]:
    """Crops of the synthetic images with random brightness and contrast."""
    for image in synthetic_images(random):
        for _ in range(_CROPS):
            top, left = (random.integers(0, side - _CROP + 1) for side in image.shape[:2])
            contrast = random.uniform(0.2, 1.0)
            yield image[top : top + _CROP, left : left + _CROP] * contrast + random.uniform(0, 1 - contrast)


def _patches(random: np.random.Generator, count: int) -> Pixels:
    """`count` x `count` patches of uniformly random colours."""
    side = _SIZE // count
    return random.random((count, count, 3)).repeat(side, axis=0).repeat(side, axis=1)


def _gradient(random: np.random.Generator) -> Pixels:
    """A gradient between two random colours in a random direction."""
    y, x = np.mgrid[0:_SIZE, 0:_SIZE] / (_SIZE - 1)
    angle = random.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    along = (along - along.min()) / (along.max() - along.min())
    start, end = random.random((2, 3))
    return np.asarray(start + along[..., None] * (end - start))


def _clouds(random: np.random.Generator, roughness: float) -> Pixels:
    """Noise whose amplitude falls with frequency, with colours correlated like in photographs."""
    frequency = np.hypot(np.fft.fftfreq(_SIZE)[:, None], np.fft.rfftfreq(_SIZE)[None, :])
    frequency[0, 0] = np.inf
    fields = [
        np.fft.irfft2(np.fft.rfft2(random.standard_normal((_SIZE, _SIZE))) / frequency**roughness, s=(_SIZE, _SIZE))
        for _ in range(3)
    ]
    light, first, second = (field / field.std() for field in fields)
    mixed = np.stack([light + 0.5 * first, light - 0.25 * first + 0.25 * second, light - 0.5 * second], axis=-1)
    return (random.uniform(0.3, 0.7, 3) + 0.2 * mixed).clip(0, 1)

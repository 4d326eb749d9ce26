"""Latents -> small images, without the VAE: each pixel is a linear map of one latent, fitted when the bundle was exported.

An autoencoder's latents keep the image's layout, and much of what they say of colour is linear once the image as a whole is
known, since a decoder normalizes over it; so a few multiplications show what a step is about to become, at the size of
the latents, in the time that the VAE would need to begin.
"""

from collections.abc import Sequence

import torch
from PIL import Image

from img2img_server.runtime.common.device_copy import send


def draw(latents: torch.Tensor, weights: Sequence[Sequence[float]]) -> list[Image.Image]:
    """RGB images of w x h pixels for `latents` [n, C, h, w], which are scaled as the UNet sees them, without noise.

    `weights` is a manifest's `latent_preview`: for each of red, green and blue, which run from 0 to 1, the weights of
    `features` and a bias.
    """
    matrix = send(torch.tensor(weights, dtype=torch.float32), latents.device)
    known = features(latents.float())
    assert matrix.shape == (3, known.shape[1] + 1), f"{tuple(matrix.shape)} is no map of {latents.shape[1]} channels"
    colours = torch.einsum("kc,nchw->nhwk", matrix[:, :-1], known) + matrix[:, -1]
    pixels = send(colours.nan_to_num().clamp(0, 1).mul(255).round(), "cpu", torch.uint8).numpy()
    return [Image.fromarray(picture) for picture in pixels]


def features(latents: torch.Tensor) -> torch.Tensor:
    """What colours are told from: latents [n, C, h, w], and each channel's mean, its square and its deviation: [n, 4C, h, w]."""
    mean, deviation = latents.mean((2, 3), keepdim=True), latents.std((2, 3), keepdim=True, correction=0)
    return torch.cat([latents, *(part.expand_as(latents) for part in (mean, mean.square(), deviation))], dim=1)

"""Previews: the final latents that a step predicts, drawn as small images without the VAE.

The finished latents (x0 in the diffusion papers) follow from a step's model output. Every scheduler that image-to-image can use
has `add_noise` (flow matching: `scale_noise`), which gives its noise level: latents = a x0 + b noise. With the level and the kind
of prediction, x0 follows. So it does not matter whether a scheduler keeps `alphas_cumprod` (DDIM), sigmas of a
variance-exploding process (Euler), flow-matching sigmas, or the preconditioning of EDM (Karras et al., 2022).

Each pixel of a preview is a linear map of one latent, fitted at export. An autoencoder's latents keep the layout of the image,
and their relation to color is mostly linear once statistics of the whole image are known, because a decoder normalizes over it.
So a few multiplications draw an image at the size of the latents, much faster than the VAE.
"""

from collections.abc import Sequence

import torch
from PIL import Image

from img2img_server.runtime.common.device_copy import send


def draw(latents: torch.Tensor, weights: Sequence[Sequence[float]]) -> list[Image.Image]:
    """RGB images of w x h pixels for `latents` [n, C, h, w] without noise, scaled as in the UNet's input.

    `weights` is a manifest's `latent_preview`: for each of red, green and blue (0 to 1), the weights of `features` and a bias.
    """
    matrix = send(torch.tensor(weights, dtype=torch.float32), latents.device)
    known = features(latents.float())
    assert matrix.shape == (3, known.shape[1] + 1), f"weights {tuple(matrix.shape)} do not fit {latents.shape[1]} channels"
    colours = torch.einsum("kc,nchw->nhwk", matrix[:, :-1], known) + matrix[:, -1]
    pixels = send(colours.nan_to_num().clamp(0, 1).mul(255).round(), "cpu", torch.uint8).numpy()
    return [Image.fromarray(image) for image in pixels]


def features(latents: torch.Tensor) -> torch.Tensor:
    """The features for fitting colors, [n, 4C, h, w]: `latents` [n, C, h, w], and each channel's mean, squared mean and standard
    deviation."""
    mean, deviation = latents.mean((2, 3), keepdim=True), latents.std((2, 3), keepdim=True, correction=0)
    return torch.cat([latents, *(part.expand_as(latents) for part in (mean, mean.square(), deviation))], dim=1)

"""Masks: after each step the latents outside a request's mask are replaced by the source's, with the noise of the next step.

That is what diffusers' inpainting pipelines do with models that were not trained for inpainting. The number of operations does
not depend on the number of requests, and requests without a mask are excluded from them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from img2img_server.engine.request import Mask
from img2img_server.runtime.common.device_copy import send
from img2img_server.runtime.schedulers.noise_levels import NoiseLevels

_HALF = 128
"""The least gray that is redrawn: diffusers rounds masks to black and white at 0.5."""


@dataclass(frozen=True, slots=True, eq=False)
class Blend:
    """The latents [n, C, h, w] that replace a request's outside its mask. All tensors have the latents' shape and device.

    `redrawn` is 1 where the mask is white, else 0, and between them for models with soft masks. `original` are the source's
    latents and `noise` that of the first step, both times 1 - `redrawn`.
    """

    redrawn: torch.Tensor
    original: torch.Tensor
    noise: torch.Tensor
    levels: NoiseLevels

    @classmethod
    def of(
        cls,
        redrawn: torch.Tensor,
        original: torch.Tensor,
        noise: torch.Tensor,
        levels: NoiseLevels,
        layout: Callable[[torch.Tensor], torch.Tensor],
    ) -> "Blend":
        """The blend of a mask for latents, [1, 1, h, w]; `original` and `noise` are whole, as the VAE has them, and `layout`
        makes a state's latents of such tensors."""
        redrawn = redrawn.expand_as(original).contiguous()
        kept = 1 - redrawn
        return cls(layout(redrawn), layout(original * kept), layout(noise * kept), levels)


def redrawn_pixels(mask: Image.Image) -> torch.Tensor:
    """A gray mask as [1, 1, H, W], on the CPU: 1 for pixels to redraw, else 0."""
    return torch.from_numpy((np.asarray(mask) >= _HALF).astype(np.float32))[None, None]


def mask_latents(mask: Image.Image, like: torch.Tensor, mode: str = "nearest") -> torch.Tensor:
    """A gray mask for latents [n, C, h, w] as [1, 1, h, w]: 1 for latents to redraw, else 0, on the device of `like`. The `mode`
    is of torch's `interpolate`; some give values between."""
    scaled = torch.nn.functional.interpolate(redrawn_pixels(mask), size=like.shape[-2:], mode=mode)
    return send(scaled, like.device, like.dtype)


def default_mask(size: tuple[int, int]) -> Mask:
    """The mask of the server's own requests to models that need one: of reference images, warm-up and measurements. It redraws
    the middle of the right half of an image of `size`."""
    width, height = size
    image = Image.new("L", size, 0)
    image.paste(255, (width // 2, height // 4, width, 3 * height // 4))
    return Mask(image)


def kept_latents(blends: Sequence[Blend], steps: Sequence[int]) -> Sequence[torch.Tensor]:
    """The latents that replace each request's outside its mask after its step, 0 elsewhere. `steps` are counted from 0."""
    levels = [blend.levels.after[step] for blend, step in zip(blends, steps, strict=True)]
    kept = torch._foreach_mul([blend.original for blend in blends], [signal for signal, _ in levels])
    noises = torch._foreach_mul([blend.noise for blend in blends], [noise for _, noise in levels])
    torch._foreach_add_(kept, noises)
    return list(kept)


def replace_kept(latents: Sequence[torch.Tensor], blends: Sequence[Blend], kept: Sequence[torch.Tensor]) -> None:
    """Replaces each request's new latents outside its mask, in place: it allocates nothing, so it does not fail after a step."""
    torch._foreach_mul_(list(latents), [blend.redrawn for blend in blends])
    torch._foreach_add_(list(latents), list(kept))


def draw_again(generators: Sequence[torch.Generator], image: Any) -> None:
    """Draws what diffusers' inpainting pipelines draw for the latents of the masked source, even if the model does not use them:
    noise that is drawn later depends on it. `image` is the output of the VAE's encoder for an image of that size."""
    if hasattr(image, "latent_dist"):
        for generator in generators:
            torch.randn(image.latent_dist.mean.shape, generator=generator)

"""Inpainting models of Stable Diffusion 1, 2 and XL, whose UNets see the mask and the source without its redrawn part.

The order of calls is that of StableDiffusionInpaintPipeline.__call__ and StableDiffusionXLInpaintPipeline.__call__.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from img2img_server.engine.request import Mask, Request
from img2img_server.runtime.common.pipe import view_of
from img2img_server.runtime.diffusion.conditioning import Encoded
from img2img_server.runtime.diffusion.masking import default_mask, mask_latents
from img2img_server.runtime.diffusion.stable_diffusion import StableDiffusion, StableDiffusionXL
from img2img_server.runtime.diffusion.state import Conditioning

_INPUT = "inpainting"
"""The UNet's input channels after the latents': the mask's [R, 1, h, w], and the latents' [R, C, h, w] of the masked source."""


class StableDiffusionInpainting(StableDiffusion):
    """An inpainting model. Requests of the server itself, which have no mask, get the default one."""

    mask_use = "required"
    takes_controls = False

    def _first_latents(
        self, pipe: Any, request: Request, timesteps: torch.Tensor, dtype: torch.dtype, generators: list[torch.Generator]
    ) -> torch.Tensor:
        (width, height), count = request.result_size, len(generators)
        latents: torch.Tensor
        latents, *_ = pipe.prepare_latents(
            count, pipe.vae.config.latent_channels, height, width, dtype, pipe._execution_device, generators,
            image=torch.empty(count, 3, 1, 1),  # stands for the image
            timestep=timesteps, is_strength_max=request.strength == 1,
        )  # fmt: skip
        return latents

    def _images(self, requests: Sequence[Request]) -> list[SimpleNamespace]:
        images = super()._images(requests)
        for image, masked in zip(images, self._encoder.masked_images(requests, list(map(_mask, requests))), strict=True):
            image.masked = masked
        return images

    def _mask_conditioning(
        self, request: Request, image: SimpleNamespace, latents: torch.Tensor, generators: list[torch.Generator]
    ) -> Conditioning:
        pipe = view_of(self._pipe, vae=Encoded(self._pipe.vae, image.masked))
        stand_in = torch.empty(len(latents), 3, 1, 1, dtype=latents.dtype, device=latents.device)
        masked = pipe._encode_vae_image(stand_in, generators)
        redrawn = mask_latents(_mask(request).image, latents).expand(len(latents), -1, -1, -1)
        rows = torch.cat([redrawn, masked.to(latents.dtype)], dim=1)
        return {_INPUT: torch.cat([rows, rows]) if self._is_guided(request) else rows}

    def _inputs(self, samples: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        given = conditioning.pop(_INPUT).to(samples.dtype)
        return super()._inputs(torch.cat([samples, given], dim=1), timesteps, conditioning)


class StableDiffusionXLInpainting(StableDiffusionInpainting, StableDiffusionXL):
    """An inpainting model of SDXL."""


def _mask(request: Request) -> Mask:
    return request.mask or default_mask(request.result_size)

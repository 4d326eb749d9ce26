"""Inpainting models of Stable Diffusion 1, 2 and XL, and Flux Fill. Their denoisers see the mask and the source without its
redrawn part.

The order of calls is that of StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline and FluxFillPipeline.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from img2img_server.engine.request import Mask, Request
from img2img_server.runtime.common.device_copy import send
from img2img_server.runtime.common.pipe import view_of
from img2img_server.runtime.diffusion.conditioning import Encoded
from img2img_server.runtime.diffusion.flux import Flux
from img2img_server.runtime.diffusion.masking import default_mask, mask_latents, redrawn_pixels
from img2img_server.runtime.diffusion.stable_diffusion import StableDiffusion, StableDiffusionXL
from img2img_server.runtime.diffusion.state import Conditioning
from img2img_server.runtime.diffusion.stepped import SteppedPipeline
from img2img_server.support.source_rule import MaskUse

_INPUT = "inpainting"
"""The denoiser's input channels after the latents': the mask's, and those of the latents of the masked source."""


class InpaintingModel(SteppedPipeline):
    """The common base of inpainting models. The server's own requests, which have no mask, get the default one."""

    mask_use: MaskUse = "required"
    takes_controls = False

    def _images(self, requests: Sequence[Request]) -> list[SimpleNamespace]:
        images = super()._images(requests)
        for image, masked in zip(images, self._encoder.masked_images(requests, list(map(_mask, requests))), strict=True):
            image.masked = masked
        return images

    def _inputs(self, samples: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        given = conditioning.pop(_INPUT).to(samples.dtype)
        joined = torch.cat([samples, given], dim=1)
        return super()._inputs(joined, timesteps, conditioning)  # type: ignore[safe-super] # a family's


class StableDiffusionInpainting(InpaintingModel, StableDiffusion):
    """An inpainting model of Stable Diffusion 1 or 2."""

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

    def _mask_conditioning(
        self, request: Request, image: SimpleNamespace, latents: torch.Tensor, generators: list[torch.Generator]
    ) -> Conditioning:
        pipe = view_of(self._pipe, vae=Encoded(self._pipe.vae, image.masked))
        stand_in = torch.empty(len(latents), 3, 1, 1, dtype=latents.dtype, device=latents.device)
        masked = pipe._encode_vae_image(stand_in, generators)
        redrawn = mask_latents(_mask(request).image, latents).expand(len(latents), -1, -1, -1)
        rows = torch.cat([redrawn, masked.to(latents.dtype)], dim=1)
        return {_INPUT: torch.cat([rows, rows]) if self._is_guided(request) else rows}


class StableDiffusionXLInpainting(StableDiffusionInpainting, StableDiffusionXL):
    """An inpainting model of SDXL."""


class FluxFill(InpaintingModel, Flux):
    """Flux Fill, which sees each pixel of the mask."""

    _patch = 24  # four for the latents, four for the masked source's, and 16 for the mask's 16 x 16 pixels a token

    def _mask_conditioning(
        self, request: Request, image: SimpleNamespace, latents: torch.Tensor, generators: list[torch.Generator]
    ) -> Conditioning:
        masked = self._tokens_of(image.masked, generators)
        # The pixels of each latent are its channels.
        redrawn = torch.nn.functional.pixel_unshuffle(redrawn_pixels(_mask(request).image), self._pipe.vae_scale_factor)
        tokens = send(self._pipe._pack_latents(redrawn, *redrawn.shape), masked.device, masked.dtype)
        return {_INPUT: self._packed(torch.cat([masked, tokens.expand(len(masked), -1, -1)], dim=2))}


def _mask(request: Request) -> Mask:
    return request.mask or default_mask(request.result_size)

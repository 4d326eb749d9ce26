"""FLUX.2, klein and Flux Kontext, which edit: the order of calls is that of their pipelines' `__call__`."""

import inspect
from typing import Any

import torch
from PIL import Image

from img2img_server.engine.request import Request
from img2img_server.runtime.common.pipe import view_as
from img2img_server.runtime.diffusion.conditioning import Embedding
from img2img_server.runtime.diffusion.flux import AnyFlux
from img2img_server.runtime.diffusion.tokens import TokenPipeline, TrulyGuidedPipeline
from img2img_server.runtime.schedulers.flow import EditSchedulers, Flux2Schedulers
from img2img_server.support.source_rule import MaskUse

_MOST_PIXELS = 1024 * 1024
"""Larger references are shrunk to this."""


class Flux2Klein(TokenPipeline):
    """klein, with guidance if it is not distilled; the negative prompt is always empty. Latents are normalized by the VAE's batch
    norm."""

    edits = True
    scheduler_cache = Flux2Schedulers
    mask_use: MaskUse = "optional"
    mask_mode = "bilinear"
    encodes_masked_source = False
    inpainting = "Flux2KleinInpaintPipeline"
    _no_image = ()

    def _is_guided(self, request: Request) -> bool:
        return request.guidance_scale > 1 and not self._pipe.config.is_distilled

    def _negative(self, request: Request) -> str:
        return ""

    def _read_texts(self, request: Request) -> dict[str, str]:
        return {"prompt": request.prompt}

    def _encode_texts(self, texts: list[str]) -> list[Embedding]:
        hidden_states, _ = self._pipe.encode_prompt(texts, self._pipe._execution_device)
        return Embedding.split(hidden_states)

    def _reference_size(self, image: Image.Image) -> tuple[int, int]:
        side = self.size_multiple
        width, height = self._shrunk(image).size
        return width // side * side, height // side * side

    def _shrunk(self, image: Image.Image) -> Image.Image:
        if image.width * image.height <= _MOST_PIXELS:
            return image
        smaller: Image.Image = self._pipe.image_processor._resize_to_target_area(image, _MOST_PIXELS)
        return smaller

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        width, height = self._reference_size(image)
        pixels: torch.Tensor = self._pipe.image_processor.preprocess(
            self._shrunk(image), height=height, width=width, resize_mode="crop"
        )
        return pixels

    def _sized_pixels(self, image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
        return super()._sized_pixels(self._shrunk(image), size)

    def _reference(self, pipe: Any) -> torch.Tensor:
        latents: torch.Tensor = pipe._encode_vae_image(image=torch.empty(1, 3, 1, 1), generator=None)
        return latents.flatten(2).transpose(1, 2)

    def _as_inpainting(self, pipe: Any) -> Any:
        return view_as(pipe, self._inpainting, latent_channels=pipe.vae.config.latent_channels)

    def _layout(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.flatten(2)[..., None]

    def _unpacked(self, latents: torch.Tensor, request: Request) -> torch.Tensor:
        width, height = (side // self.size_multiple for side in request.result_size)
        latents, vae = latents.reshape(len(latents), -1, height, width), self._pipe.vae
        mean, variance = (part.view(1, -1, 1, 1).to(latents) for part in (vae.bn.running_mean, vae.bn.running_var))
        unpacked: torch.Tensor = self._pipe._unpatchify_latents(latents * torch.sqrt(variance + vae.config.batch_norm_eps) + mean)
        return unpacked

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self._pipe.vae.decode(latents, return_dict=False)[0])


class Flux2(Flux2Klein):
    """FLUX.2, whose guidance is an input of the transformer. diffusers has no inpainting class of it."""

    mask_use = "none"
    inpainting = ""

    def _is_guided(self, request: Request) -> bool:
        return False


class FluxKontext(TrulyGuidedPipeline, AnyFlux):
    """Flux Kontext: Flux dev, which looks at the source at one of its training sizes. With a mask it can look at a reference
    instead."""

    edits = True
    scheduler_cache = EditSchedulers
    mask_use: MaskUse = "optional"
    inpainting = "FluxKontextInpaintPipeline"

    def _reference_size(self, image: Image.Image) -> tuple[int, int]:
        sizes = inspect.getmodule(type(self._pipe).prepare_latents).PREFERRED_KONTEXT_RESOLUTIONS  # type: ignore[union-attr]
        height, width = self._pipe.image_processor.get_default_height_width(image)
        _, *chosen = min((abs(width / height - w / h), w, h) for w, h in sizes)
        wide, high = (side // self.size_multiple * self.size_multiple for side in chosen)
        return wide, high

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        return self._sized_pixels(image, self._reference_size(image))

    def _sees_source(self, request: Request) -> bool:
        return not request.references

"""Qwen-Image, Qwen-Image-Edit and -Edit-Plus: the order of calls is that of their pipelines' `__call__`."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from img2img_server.engine.request import Request
from img2img_server.runtime.diffusion.conditioning import Embedding
from img2img_server.runtime.diffusion.state import DiffusionState, Noise
from img2img_server.runtime.diffusion.tokens import SeeingPipeline, TrulyGuidedPipeline
from img2img_server.runtime.schedulers.flow import EditSchedulers, FluxSchedulers
from img2img_server.support.source_rule import MaskUse


class QwenImage(TrulyGuidedPipeline):
    """Guided if there is a negative prompt; the result has the length of the prompt's prediction."""

    scheduler_cache = FluxSchedulers
    mask_use: MaskUse = "optional"

    def _encode_texts(self, texts: list[str]) -> list[Embedding]:
        return self._cut(*self._pipe.encode_prompt(texts, self._pipe._execution_device))

    def _cut(self, hidden_states: torch.Tensor, mask: torch.Tensor | None) -> list[Embedding]:
        """The embeddings without the padding that texts of one call get."""
        lengths = [hidden_states.shape[1]] * len(hidden_states) if mask is None else mask.sum(1).tolist()
        return [Embedding(one[None, :length], None) for one, length in zip(hidden_states, lengths, strict=True)]

    def _guide(self, states: Sequence[DiffusionState], noises: Sequence[Noise], guidance: torch.Tensor) -> Sequence[torch.Tensor]:
        guided = super()._guide(states, noises, guidance)
        return [
            output * (noise[-1].norm(dim=1, keepdim=True) / output.norm(dim=1, keepdim=True)) if state.guided else output
            for state, noise, output in zip(states, noises, guided, strict=True)
        ]

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        return super()._pixels(image)[:, :, None]

    def _layout(self, latents: torch.Tensor) -> torch.Tensor:
        count, _, channels, height, width = latents.shape
        return self._packed(self._pipe._pack_latents(latents, count, channels, height, width))

    def _unpacked(self, latents: torch.Tensor, request: Request) -> torch.Tensor:
        return super()._unpacked(latents, request)[:, :, 0]

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self._pipe.vae
        mean, deviation = (
            torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        frames = (latents * deviation + mean)[:, :, None]
        return torch.as_tensor(vae.decode(frames, return_dict=False)[0][:, :, 0])


class QwenImageEdit(SeeingPipeline, QwenImage):
    """The text encoder sees the source, too: at about a million pixels, as the transformer does."""

    edits = True
    scheduler_cache = EditSchedulers
    inpainting = "QwenImageEditInpaintPipeline"

    def _see(self, request: Request, text: str) -> Embedding:
        (found,) = self._cut(*self._pipe.encode_prompt(text, self._prompt_image(request), self._pipe._execution_device))
        return found

    def _prompt_image(self, request: Request) -> Any:
        """The request's images as the text encoder sees them."""
        width, height = self._reference_size(request.image)
        return self._pipe.image_processor.resize(request.image, height, width)

    def _fitted(self, area: int, image: Image.Image) -> tuple[int, int]:
        module: Any = inspect.getmodule(type(self._pipe).prepare_latents)
        width, height, *_ = module.calculate_dimensions(area, image.width / image.height)
        return int(width), int(height)

    def _reference_size(self, image: Image.Image) -> tuple[int, int]:
        return self._fitted(1024 * 1024, image)

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        return self._sized_pixels(image, self._reference_size(image))

    def _sized_pixels(self, image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
        return super()._sized_pixels(image, size)[:, :, None]

    def _reference(self, pipe: Any) -> torch.Tensor:
        latents = pipe._encode_vae_image(image=torch.empty(1, 3, 1, 1, 1), generator=None)
        channels, _, height, width = latents.shape[1:]
        tokens: torch.Tensor = pipe._pack_latents(latents, 1, channels, height, width)
        return tokens


class QwenImageEditPlus(QwenImageEdit):
    """The text encoder and the transformer see the images at different sizes. diffusers has no inpainting class of it."""

    mask_use = "none"
    inpainting = ""

    def _prompt_image(self, request: Request) -> Any:
        module: Any = inspect.getmodule(type(self._pipe).prepare_latents)
        images = [(image, self._fitted(module.CONDITION_IMAGE_SIZE, image)) for image in (request.image, *request.references)]
        return [self._pipe.image_processor.resize(image, height, width) for image, (width, height) in images]

    def _reference_size(self, image: Image.Image) -> tuple[int, int]:
        module: Any = inspect.getmodule(type(self._pipe).prepare_latents)
        return self._fitted(module.VAE_IMAGE_SIZE, image)

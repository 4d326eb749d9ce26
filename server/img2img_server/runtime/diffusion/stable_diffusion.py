"""Stable Diffusion 1, 2 and XL.

The order of calls is that of StableDiffusionImg2ImgPipeline.__call__ and StableDiffusionXLImg2ImgPipeline.__call__.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from img2img_server.engine.request import Request
from img2img_server.runtime.common.device_copy import send
from img2img_server.runtime.diffusion.conditioning import Embedding
from img2img_server.runtime.diffusion.state import Conditioning
from img2img_server.runtime.diffusion.stepped import SteppedPipeline
from img2img_server.support.source_rule import MaskUse


class StableDiffusion(SteppedPipeline):
    """Stable Diffusion 1 and 2, and models with the same components."""

    mask_use: MaskUse = "optional"
    takes_controls = True

    def _is_guided(self, request: Request) -> bool:
        return request.guidance_scale > 1 and self._denoiser.config.get("time_cond_proj_dim") is None

    def _inputs(self, samples: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        return {
            "sample": samples,
            "timestep": timesteps,
            "encoder_hidden_states": conditioning.pop("encoder_hidden_states"),
            "timestep_cond": conditioning.pop("timestep_cond", None),
            "added_cond_kwargs": conditioning,
        }

    def _more_conditioning(self, pipe: Any, request: Request, latents: torch.Tensor) -> Conditioning:
        """Guidance as an input of the UNet, if it was distilled into it."""
        width = self._denoiser.config.get("time_cond_proj_dim")
        if width is None:
            return {}
        scales = torch.tensor(request.guidance_scale - 1).repeat(len(latents))
        embedding: torch.Tensor = self._pipe.get_guidance_scale_embedding(scales, embedding_dim=width)
        return {"timestep_cond": embedding.to(latents.device, latents.dtype)}

    def _pure_noise(self, latents: torch.Tensor, noise: torch.Tensor, scheduler: Any) -> torch.Tensor:
        return noise * float(scheduler.init_noise_sigma)

    def _encode_texts(self, texts: list[str]) -> list[Embedding]:
        hidden_states, _ = self._pipe.encode_prompt(texts, self._pipe._execution_device, 1, False)
        return Embedding.split(hidden_states)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self._pipe.vae
        pixels = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        if self._pipe.safety_checker is None:
            return torch.as_tensor(pixels)
        checked, flagged = self._pipe.run_safety_checker(pixels, pixels.device, pixels.dtype)
        if any(flagged or ()):
            logging.getLogger(__name__).info("the model's safety checker blanked an image")
        return torch.as_tensor(checked)


class StableDiffusionXL(StableDiffusion):
    """SDXL base and refiner: a second text encoder, pooled embeddings and size conditioning. No watermark is applied."""

    def _texts(self, request: Request) -> list[str]:
        return [request.prompt] if self._negative_is_zero(request) else super()._texts(request)

    def _embeddings(self, request: Request, known: dict[str, Embedding]) -> tuple[Embedding, Embedding | None]:
        if self._is_guided(request) and self._negative_is_zero(request):
            return known[request.prompt], known[request.prompt].zeros()
        return super()._embeddings(request, known)

    def _negative_is_zero(self, request: Request) -> bool:
        return request.negative_prompt is None and bool(self._pipe.config.force_zeros_for_empty_prompt)

    def _encode_texts(self, texts: list[str]) -> list[Embedding]:
        hidden_states, _, pooled, _ = self._pipe.encode_prompt(
            prompt=texts, device=self._pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Embedding.split(hidden_states, pooled)

    def _more_conditioning(self, pipe: Any, request: Request, latents: torch.Tensor) -> Conditioning:
        size = (latents.shape[-2] * pipe.vae_scale_factor, latents.shape[-1] * pipe.vae_scale_factor)
        # diffusers' default arguments: no crop, aesthetic scores 6.0 and 2.5.
        positive, negative = pipe._get_add_time_ids(
            size, (0, 0), size, 6.0, 2.5, size, (0, 0), size,
            dtype=latents.dtype, text_encoder_projection_dim=pipe.text_encoder_2.config.projection_dim,
        )  # fmt: skip
        rows = [negative] * len(latents) + [positive] * len(latents) if self._is_guided(request) else [positive] * len(latents)
        return super()._more_conditioning(pipe, request, latents) | {"time_ids": torch.cat(rows).to(latents.device)}

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self._pipe.vae
        latents = latents / vae.config.scaling_factor
        mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
        if mean is not None and std is not None:
            latents = latents * _channels(std, latents) + _channels(mean, latents)
        return torch.as_tensor(vae.decode(latents, return_dict=False)[0])


def _channels(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return send(torch.tensor(values, dtype=like.dtype), like.device).view(1, -1, 1, 1)

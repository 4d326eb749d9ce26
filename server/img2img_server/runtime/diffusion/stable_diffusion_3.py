"""Stable Diffusion 3 and 3.5: the order of calls is that of StableDiffusion3Img2ImgPipeline.__call__."""

from typing import Any

import torch

from img2img_server.engine.request import Plan, Request
from img2img_server.errors import InvalidField
from img2img_server.runtime.common.vae import decode_shifted
from img2img_server.runtime.diffusion.conditioning import Embedding
from img2img_server.runtime.diffusion.state import Conditioning, DiffusionState
from img2img_server.runtime.diffusion.stepped import SteppedPipeline
from img2img_server.runtime.diffusion.tokens import PatchedPipeline
from img2img_server.runtime.schedulers.flow import FlowSchedulers


class StableDiffusion3(SteppedPipeline):
    """A transformer, flow matching, and up to three text encoders. The transformer is diffusers' own, or a graph of it as other
    tools make it: the images of a call have one size."""

    scheduler_cache = FlowSchedulers
    denoiser_name = "transformer"
    pooled_name = "pooled_projections"
    mask_use = "optional"

    def plan(self, request: Request) -> Plan:
        """The plan of a request. Raises InvalidField for an image that is larger than the transformer's positions."""
        most = (self._denoiser.config.get("pos_embed_max_size") or 0) * self.size_multiple
        for field, side in zip(("width", "height"), request.image.size, strict=True):
            if 0 < most < side:
                raise InvalidField(field, f"{side} pixels are more than the {most} that this model can draw")
        return super().plan(request)

    def _is_guided(self, request: Request) -> bool:
        return request.guidance_scale > 1

    def _encode_texts(self, texts: list[str]) -> list[Embedding]:
        hidden_states, _, pooled, _ = self._pipe.encode_prompt(
            texts, None, None, self._pipe._execution_device, do_classifier_free_guidance=False
        )
        return Embedding.split(hidden_states, pooled)

    def _inputs(self, samples: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        return {"hidden_states": samples, "timestep": timesteps, **conditioning}

    def _final_latents(self, state: DiffusionState) -> torch.Tensor:
        latents = super()._final_latents(state)
        if state.blend is None:
            return latents
        # StableDiffusion3InpaintPipeline decodes without the shift (huggingface/diffusers#13611), and so do we.
        config = self._pipe.vae.config
        return latents - float(config.shift_factor * config.scaling_factor)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        return decode_shifted(self._pipe.vae, latents)


class StableDiffusion3Tokens(StableDiffusion3, PatchedPipeline):
    """With a graph of tokens: the images of a call have one number of tokens."""

    def _first_latents(
        self, pipe: Any, request: Request, timesteps: torch.Tensor, dtype: torch.dtype, generators: list[torch.Generator]
    ) -> torch.Tensor:
        return self._packed(SteppedPipeline._first_latents(self, pipe, request, timesteps, dtype, generators))

    def _inputs(self, samples: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        return {**PatchedPipeline._inputs(self, samples, timesteps, conditioning), "timestep": timesteps}

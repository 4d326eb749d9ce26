"""Z-Image: the order of calls is that of ZImageImg2ImgPipeline.__call__."""

from typing import Any

import torch

from img2img_server.engine.request import Request
from img2img_server.runtime.common.vae import decode_shifted
from img2img_server.runtime.diffusion.conditioning import Embedding
from img2img_server.runtime.diffusion.state import Conditioning
from img2img_server.runtime.diffusion.tokens import PatchedPipeline
from img2img_server.runtime.onnx.token_graphs import filled
from img2img_server.runtime.schedulers.flow import ZImageSchedulers
from img2img_server.support.source_rule import MaskUse


class ZImage(PatchedPipeline):
    """Any guidance above 0 guides; the class counts it from the prompt's prediction. The transformer predicts the negative."""

    scheduler_cache = ZImageSchedulers
    mask_use: MaskUse = "optional"
    _patch = 1

    def _is_guided(self, request: Request) -> bool:
        return request.guidance_scale > 0

    def _guidance(self, request: Request) -> float:
        return request.guidance_scale + 1

    def _encode_texts(self, texts: list[str]) -> list[Embedding]:
        # The pipeline writes its chat template into the list.
        found, _ = self._pipe.encode_prompt(list(texts), self._pipe._execution_device, do_classifier_free_guidance=False)
        return [Embedding(hidden_states[None], None) for hidden_states in found]

    def _inputs(self, samples: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        inputs = super()._inputs(samples, timesteps, conditioning)
        return {**inputs, "hidden_states": filled(inputs["hidden_states"]), "timestep": (1000 - timesteps) / 1000}

    def _noise(self, output: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        return -super()._noise(output, samples)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        return decode_shifted(self._pipe.vae, latents)

"""LongCat-Image-Edit: the order of calls is that of LongCatImageEditPipeline.__call__."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from img2img_server.engine.request import Plan, Request
from img2img_server.runtime.common.rotary import Size
from img2img_server.runtime.diffusion.conditioning import Embedding
from img2img_server.runtime.diffusion.flux import AnyFlux
from img2img_server.runtime.diffusion.state import DiffusionState
from img2img_server.runtime.diffusion.tokens import SeeingPipeline
from img2img_server.runtime.schedulers.flow import EditSchedulers


class LongCatImageEdit(SeeingPipeline, AnyFlux):
    """The transformer sees the source at the result's size, and the text encoder at half its width and height."""

    edits = True
    scheduler_cache = EditSchedulers

    def plan(self, request: Request) -> Plan:
        """The plan of a request for an image of the model's own size."""
        return super().plan(self._sized(request))

    def prepare(self, requests: Sequence[Request]) -> Sequence[DiffusionState]:
        """Prepares requests for images of the model's own sizes."""
        return super().prepare([self._sized(request) for request in requests])

    def _sized(self, request: Request) -> Request:
        """The request for an image of the size that the model makes of the source. The server's own requests do not set it."""
        return replace(request, size=self.source_rule.own_size(request.image.size))

    def _see(self, request: Request, text: str) -> Embedding:
        (width, height), processor = request.result_size, self._pipe.image_processor
        image = processor.resize(processor.resize(request.image, height, width), height // 2, width // 2)
        hidden_states, _ = self._pipe.encode_prompt([text], image)
        return Embedding(hidden_states, None)

    def _sizes(self, request: Request) -> list[Size]:
        width, height = (side // self.size_multiple for side in request.result_size)
        return [(height, width)] * 2

    def _images(self, requests: Sequence[Request]) -> list[SimpleNamespace]:
        return self._encoder.sized_images(requests, self._sized_pixels)

    def _first_latents(
        self, pipe: Any, request: Request, timesteps: torch.Tensor, dtype: torch.dtype, generators: list[torch.Generator]
    ) -> torch.Tensor:
        (width, height), count = request.result_size, len(generators)
        place = (count, self._denoiser.config.in_channels // self._patch, height, width, dtype)
        latents, *_ = pipe.prepare_latents(None, *place, 0, pipe._execution_device, generators)  # 0: for positions
        return self._packed(latents)

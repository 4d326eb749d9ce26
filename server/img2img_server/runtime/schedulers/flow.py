"""Schedulers of flow-matching models, by the rules of diffusers' img2img pipelines of Stable Diffusion 3 and Flux.

Some models shift their timesteps by the image's size (dynamic shifting), so that size is part of a scheduler's key.
"""

import inspect
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux_img2img import calculate_shift, retrieve_timesteps

from img2img_server.engine.request import Request
from img2img_server.runtime.common.pipe import size_multiple
from img2img_server.runtime.schedulers.cache import SchedulerCache

_SHIFT = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
"""What a scheduler's configuration says of dynamic shifting, in the order of `calculate_shift`."""


class FlowSchedulers(SchedulerCache):
    """Those of Stable Diffusion 3. A strength above 0 leaves at least one step, unless it is lost in rounding."""

    def _first_steps(self, request: Request) -> int:
        steps = request.num_inference_steps
        return steps - int(max(steps - min(steps * request.strength, steps), 0))

    def _key(self, request: Request) -> Hashable:
        return super()._key(request), self._shift(request)

    def _set(self, view: Any, request: Request, device: torch.device) -> torch.Tensor:
        retrieve_timesteps(view.scheduler, request.num_inference_steps, device, **self._arguments(request))
        timesteps: torch.Tensor
        timesteps, _ = view.get_timesteps(request.num_inference_steps, request.strength, device)
        return timesteps

    def _arguments(self, request: Request) -> dict[str, Any]:
        """The arguments of `set_timesteps` beside the number of steps."""
        shift = self._shift(request)
        return {} if shift is None else {"mu": shift}

    def _shift(self, request: Request) -> float | None:
        """How far the timesteps of an image of this size are shifted; None for a model that shifts all alike."""
        config = self._pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return None
        side = size_multiple(self._pipe)
        tokens = (request.image.width // side) * (request.image.height // side)
        return float(calculate_shift(tokens, *(config[name] for name in _SHIFT)))


class FluxSchedulers(FlowSchedulers):
    """Those of Flux, whose pipeline spaces the noise levels itself."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        accepted = {name: inspect.signature(self._scheduler(name).set_timesteps).parameters for name in self.names}
        self.names = tuple(name for name in self.names if "sigmas" in accepted[name])

    def _arguments(self, request: Request) -> dict[str, Any]:
        steps = request.num_inference_steps
        return {"sigmas": np.linspace(1.0, 1 / steps, steps)} | super()._arguments(request)

"""Schedulers of flow-matching models, by the rules of diffusers' pipelines of Stable Diffusion 3, Flux, FLUX.2 and Z-Image.

Some models shift their timesteps by the image's size (dynamic shifting), so that size is part of a scheduler's key.
"""

import inspect
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch

from img2img_server.engine.request import Request
from img2img_server.runtime.common.pipe import size_multiple
from img2img_server.runtime.schedulers.cache import SchedulerCache

_SHIFT = {
    "base_image_seq_len": "base_seq_len",
    "max_image_seq_len": "max_seq_len",
    "base_shift": "base_shift",
    "max_shift": "max_shift",
}
"""Keys of dynamic shifting in a scheduler's configuration, and the parameters of `calculate_shift`, which have defaults."""


class FlowSchedulers(SchedulerCache):
    """The schedulers of Stable Diffusion 3. A strength above 0 leaves at least one step, unless it is lost in rounding."""

    def _first_steps(self, request: Request) -> int:
        steps = request.num_inference_steps
        return steps - int(max(steps - min(steps * request.strength, steps), 0))

    def _key(self, request: Request) -> Hashable:
        return super()._key(request), self._shift(request)

    def _set(self, view: Any, request: Request, device: torch.device) -> torch.Tensor:
        _retrieve_timesteps(view.scheduler, request.num_inference_steps, device, **self._arguments(request))
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
        return self._shift_of(self._tokens(request), request.num_inference_steps)

    def _shift_of(self, tokens: int, steps: int) -> float:
        """The shift for an image of so many tokens."""
        from diffusers.pipelines.flux.pipeline_flux_img2img import calculate_shift

        config = self._pipe.scheduler.config
        return float(calculate_shift(tokens, **{parameter: config[name] for name, parameter in _SHIFT.items() if name in config}))

    def _tokens(self, request: Request) -> int:
        width, height = (length // size_multiple(self._pipe) for length in request.result_size)
        return width * height


class FluxSchedulers(FlowSchedulers):
    """The schedulers of Flux, whose pipeline spaces the noise levels itself."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        accepted = {name: inspect.signature(self._scheduler(name).set_timesteps).parameters for name in self.names}
        self.names = tuple(name for name in self.names if "sigmas" in accepted[name])

    def _arguments(self, request: Request) -> dict[str, Any]:
        return {"sigmas": self._sigmas(request.num_inference_steps)} | super()._arguments(request)

    def _sigmas(self, steps: int) -> Any:
        return np.linspace(1.0, 1 / steps, steps)


class ZImageSchedulers(FluxSchedulers):
    """The schedulers of Z-Image, which spaces the noise levels in single precision."""

    def _sigmas(self, steps: int) -> Any:
        return torch.linspace(1.0, 1 / steps, steps).tolist()


class EditSchedulers(FluxSchedulers):
    """The schedulers of models that edit: without a mask they have no strength, and run all steps."""

    def _first_steps(self, request: Request) -> int:
        return request.num_inference_steps if request.mask is None else super()._first_steps(request)

    def _set(self, view: Any, request: Request, device: torch.device) -> torch.Tensor:
        timesteps: torch.Tensor
        timesteps, _ = _retrieve_timesteps(view.scheduler, request.num_inference_steps, device, **self._arguments(request))
        first = (request.num_inference_steps - self._first_steps(request)) * view.scheduler.order
        view.scheduler.set_begin_index(first)
        return timesteps[first:]


class Flux2Schedulers(EditSchedulers):
    """The schedulers of FLUX.2, whose shift also depends on the number of steps."""

    def _shift_of(self, tokens: int, steps: int) -> float:
        # Older releases of diffusers have no FLUX.2.
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return float(compute_empirical_mu(tokens, steps))

    def _sigmas(self, steps: int) -> Any:
        # Schedulers for more than flow matching (UniPC, DPM++) space the noise levels themselves.
        return None if self._pipe.scheduler.config.get("use_flow_sigmas") else super()._sigmas(steps)


def _retrieve_timesteps(*arguments: Any, **named: Any) -> Any:
    """diffusers' function, which all its flow-matching pipelines have. Imported when it is needed: it takes seconds."""
    from diffusers.pipelines.flux.pipeline_flux_img2img import retrieve_timesteps

    return retrieve_timesteps(*arguments, **named)

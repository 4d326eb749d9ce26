"""Speedups of requests: chosen as the fastest of the bundle that keeps the request's bound, if it was measured for such requests;
and the calls of light graphs."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from img2img_server.bundle.speedups import Speedup, Speedups
from img2img_server.engine.request import Request, RequestWarning, StepCall, UsedSpeedup
from img2img_server.runtime.diffusion.state import DiffusionState
from img2img_server.runtime.schedulers.cache import CachedScheduler

EXACT_CODE = "FIDELITY_EXACT"
"""The code of the warning that a request with a bound runs all its steps in full."""
_LIGHT = "light"


@dataclass(frozen=True, slots=True)
class Chosen:
    """The work that a request skips. `called` are the steps in which it calls the model, and `light` says for each of these
    whether it is light; both are empty without a `speedup`. `reason` is why a request that allows one has none."""

    speedup: Speedup | None = None
    called: tuple[int, ...] = ()
    light: tuple[bool, ...] = ()
    times_faster: float = 1.0
    reason: str = ""

    @property
    def skips(self) -> bool:
        """Whether the model is called in a part of the steps only."""
        return self.speedup is not None and self.speedup.skip_period > 0

    @property
    def used(self) -> UsedSpeedup | None:
        """The speedup for the request's plan, None if it has none."""
        one = self.speedup
        return None if one is None else UsedSpeedup(one.name, self.times_faster, one.psnr_db, one.ssim)

    @property
    def warnings(self) -> tuple[RequestWarning, ...]:
        """Tells the caller that the images are exact although they need not be."""
        if not self.reason:
            return ()
        return (RequestWarning("fidelity", f"all steps were computed in full: {self.reason}", EXACT_CODE),)


@dataclass(slots=True)
class SpeedupChooser:
    """The speedups of a pipeline. `scheduler` is the class of its own scheduler; `has_features` whether its denoiser can keep
    deep features."""

    speedups: Speedups
    scheduler: str
    has_features: bool

    @property
    def keeps_features(self) -> bool:
        """Whether requests may call the light graph."""
        return self.has_features and any(one.keeps_features for one in self.speedups.table)

    def choose(self, request: Request, scheduler: CachedScheduler, is_guided: bool) -> Chosen:
        """The speedup of a request with this scheduler; `is_guided` if its steps have two rows for an image."""
        if request.fidelity.is_exact:
            return Chosen()
        if reason := self._obstacle(request):
            return Chosen(reason=reason)
        bound = request.fidelity
        able = self._able(scheduler)
        kept = [self._of(one, len(scheduler.times), is_guided) for one in able if one.keeps(bound.psnr_db, bound.ssim)]
        if not kept:
            return Chosen(reason=f"no speedup of this model keeps a fidelity of {request.fidelity}")
        best = max(kept, key=lambda one: one.times_faster)
        if best.times_faster <= 1:
            return Chosen(reason="its speedups skip nothing in so few steps, or without guidance")
        return best

    def calls(self, chosen: Chosen, shape: Hashable, pixels: int, images: int, is_guided: bool) -> tuple[StepCall, ...]:
        """The request's part in the call of each step, of which a full one has `shape` and `pixels`."""
        one = chosen.speedup
        if one is None or True not in chosen.light:
            return ()
        full = StepCall(shape, pixels, images * (2 if is_guided else 1))
        light = StepCall(
            (_LIGHT, shape) if one.keeps_features else shape,
            max(1, round(pixels * self.speedups.light_cost)) if one.keeps_features else pixels,
            images * (2 if is_guided and not one.keeps_guidance else 1),
        )
        return tuple(light if is_light else full for is_light in chosen.light)

    def _obstacle(self, request: Request) -> str:
        """Why the bundle's measurements do not hold for a request, "" if they do."""
        known = self.speedups
        if not known.table:
            return "this model has no measured speedups"
        if request.loras:
            return "its speedups were measured without LoRAs"
        if any(control.model for control in request.controls):
            return "its speedups were measured without controls"
        if request.image_prompts:
            return "its speedups were measured without image prompts"
        if request.scheduler not in (None, self.scheduler):
            return f"its speedups were measured with {self.scheduler}"
        if request.num_inference_steps < known.least_steps:
            return f"its speedups were measured with {known.least_steps} or more inference steps"
        if request.guidance_scale > known.most_guidance:
            return f"its speedups were measured with a guidance scale of up to {known.most_guidance:g}"
        return ""

    def _able(self, scheduler: CachedScheduler) -> list[Speedup]:
        """The settings that are possible with this denoiser and scheduler."""
        able = [one for one in self.speedups.table if self.has_features or not one.keeps_features]
        return able if scheduler.can_skip else [one for one in able if not one.skip_period]

    def _of(self, speedup: Speedup, count: int, is_guided: bool) -> Chosen:
        called = speedup.called_steps(count)
        light = speedup.light_steps(len(called))
        rows = 0.5 if speedup.keeps_guidance and is_guided else 1.0
        cost = rows * (self.speedups.light_cost if speedup.keeps_features else 1.0)
        return Chosen(speedup, called, light, count / (len(called) - light.count(True) * (1 - cost)))


def no_speedup(request: Request, reason: str) -> Sequence[RequestWarning]:
    """The warnings of a pipeline without speedups about a request."""
    return () if request.fidelity.is_exact else Chosen(reason=reason).warnings


def with_features(
    denoiser: Any, states: Sequence[DiffusionState], keepers: Sequence[DiffusionState], inputs: dict[str, Any]
) -> torch.Tensor:
    """The denoiser's output for all rows, of which those of `keepers` keep the deep features of full steps for light ones."""
    if keepers[0].is_light:  # and so are all: light steps are of another shape
        light: torch.Tensor = denoiser.predict_light(torch.cat([state.next_features for state in states]), **inputs)
        return light
    whole: tuple[torch.Tensor, torch.Tensor] = denoiser.predict_with_features(**inputs)
    predicted, features = whole
    for state, own in zip(states, torch.split(features, [state.rows for state in states]), strict=True):
        if state in keepers:
            state.features = own.clone()  # without the batch's other rows
    return predicted


def record_light(denoiser: Any, inputs: dict[str, Any]) -> None:
    """Calls the light graph on the rows of a call, so that it is recorded before the first request that needs it."""
    _, features = denoiser.predict_with_features(**inputs)
    denoiser.predict_light(features, **inputs)

"""The noise levels of diffusers' schedulers: latents at a timestep are a x0 + b noise, with x0 the latents without noise."""

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from img2img_server.runtime.schedulers.registry import is_flow


def noise_level(scheduler: Any, timestep: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """The factors of x0 and of noise in the latents at `timestep` [1], computed in `dtype` on the CPU. Does not change the
    scheduler."""
    level = copy.copy(scheduler)  # add_noise moves its tables to the latents' device
    one, zero = torch.ones(1, 1, 1, 1, dtype=dtype), torch.zeros(1, 1, 1, 1, dtype=dtype)
    if is_flow(level):
        return float(level.scale_noise(one, timestep, zero)), float(level.scale_noise(zero, timestep, one))
    return float(level.add_noise(one, zero, timestep)), float(level.add_noise(zero, one, timestep))


def level_at(scheduler: Any, index: int, timestep: torch.Tensor) -> tuple[float, float]:
    """The noise level at the scheduler's timestep number `index`, whose value is `timestep`, as `noise_level` returns it.
    Schedulers that repeat timesteps go by the number."""
    at_step = copy.copy(scheduler)
    if hasattr(at_step, "set_begin_index"):
        at_step._step_index = None
        at_step.set_begin_index(index)  # add_noise then uses this step's level
    return noise_level(at_step, timestep.cpu().reshape(1))


def predict_original(
    scheduler: Any, index: int, timestep: torch.Tensor, sample: torch.Tensor, output: torch.Tensor, input_scale: float
) -> torch.Tensor | None:
    """The latents [n, C, h, w] without noise that the model's `output` predicts for `sample`, both [n, C, h, w].

    `index` is the step's position in the scheduler's timesteps, `timestep` its value, `input_scale` the factor by which the
    scheduler scales latents for the model. The scheduler is not changed. None if its prediction type is unknown.
    """
    signal, noise = level_at(scheduler, index, timestep)
    if hasattr(scheduler, "precondition_outputs"):  # EDM
        original: torch.Tensor = scheduler.precondition_outputs(sample, output, torch.tensor(noise))
        return original
    if is_flow(scheduler):  # flow matching predicts noise - x0
        return sample - noise * output
    if signal == 1.0 and input_scale < 1.0:
        # A variance-exploding process. KDPM2's middle steps have a noise level that only the scale shows.
        noise = math.sqrt(input_scale**-2 - 1.0)
    match scheduler.config.get("prediction_type"):
        case "epsilon":
            return (sample - noise * output) / signal if signal else None
        case "sample":
            return output
        case "v_prediction":
            squared = signal**2 + noise**2
            return signal / squared * sample - noise / math.sqrt(squared) * output
        case "flow_prediction":
            return sample - noise * output
    return None


class NoiseLevels:
    """The noise levels of `timesteps` [S], the last S of the scheduler's, which scales latents by `input_scales` for the model.
    `called` are the steps in which the model is called, None for all. Computed on first use."""

    def __init__(
        self, scheduler: Any, timesteps: torch.Tensor, input_scales: Sequence[float], called: Sequence[int] | None = None
    ) -> None:
        self._scheduler = scheduler
        self._timesteps = timesteps
        self._scales = input_scales
        self._nexts = list(range(1, len(timesteps))) if called is None else list(called[1:])

    def part(self, called: Sequence[int]) -> "NoiseLevels":
        """The noise levels of a solver that joins the steps from each of `called` up to the next."""
        return NoiseLevels(self._scheduler, self._timesteps, self._scales, called)

    @functools.cached_property
    def after(self) -> tuple[tuple[float, float], ...]:
        """For each step that calls the model, the factors of x0 and of noise in the latents at the next call; (1, 0) after the
        last."""
        times, first = self._timesteps.cpu(), self._first
        return (*(level_at(self._scheduler, first + step, times[step]) for step in self._nexts), (1.0, 0.0))

    @functools.cached_property
    def predicted(self) -> tuple[tuple[float, float] | None, ...]:
        """For each step, the factors of the latents and of the model's output in the image that it predicts; None if that is not
        known."""
        one, zero = torch.ones(1), torch.zeros(1)
        found: list[tuple[float, float] | None] = []
        for step, (time, scale) in enumerate(zip(self._timesteps.cpu(), self._scales, strict=True)):
            of = functools.partial(predict_original, self._scheduler, self._first + step, time)
            share, factor = of(one, zero, scale), of(zero, one, scale)
            found.append(None if share is None or factor is None or not factor.any() else (float(share), float(factor)))
        return tuple(found)

    @property
    def _first(self) -> int:
        """The position of the first timestep in the scheduler's."""
        return len(self._scheduler.timesteps) - len(self._timesteps)


class Noising:
    """A scheduler whose add_noise looks up the noise level on the CPU. diffusers' own looks it up on the device and moves its
    tables there."""

    given: tuple[torch.Tensor, torch.Tensor] | None = None
    """The source's latents and the noise, both [n, C, h, w], after noise was added."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def add_noise(self, original: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The latents `original` with noise, at the first of `timesteps`."""
        self.given = original, noise
        signal, level = noise_level(self._scheduler, timesteps[:1], original.dtype)
        return signal * original + level * noise

    def scale_noise(self, original: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Adds noise as flow-matching schedulers do, which have no `add_noise`."""
        return self.add_noise(original, noise, timesteps)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

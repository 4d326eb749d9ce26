"""The noise levels of diffusers' schedulers: latents at a timestep are a x0 + b noise, with x0 the latents without noise."""

import copy
import functools
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


class NoiseLevels:
    """The noise levels after each of `timesteps` [S], the last S of the scheduler's; with `called`, after those before each of
    these steps and after the last. Computed on first use."""

    def __init__(self, scheduler: Any, timesteps: torch.Tensor, called: Sequence[int] | None = None) -> None:
        self._scheduler = scheduler
        self._timesteps = timesteps
        self._nexts = list(range(1, len(timesteps))) if called is None else list(called[1:])

    def part(self, called: Sequence[int]) -> "NoiseLevels":
        """Those of a solver that joins the steps from each of `called` up to the next."""
        return NoiseLevels(self._scheduler, self._timesteps, called)

    @functools.cached_property
    def after(self) -> tuple[tuple[float, float], ...]:
        """For each step, the factors of x0 and of noise in the latents after it. There is no noise after the last."""
        first = len(self._scheduler.timesteps) - len(self._timesteps)
        times = self._timesteps.cpu()
        return (*(level_at(self._scheduler, first + step, times[step]) for step in self._nexts), (1.0, 0.0))

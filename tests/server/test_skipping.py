"""Steps without a call of the model: diffusers' schedulers, given outputs that predict the same image again."""

import copy
import math
from typing import Any

import diffusers
import pytest
import torch
from fakes import make_request
from img2img_server.engine.request import Request
from img2img_server.runtime.schedulers import registry
from img2img_server.runtime.schedulers.cache import CachedScheduler, SchedulerCache
from img2img_server.runtime.schedulers.flow import FlowSchedulers
from img2img_server.runtime.schedulers.linear import Trajectory, advance_batch, step_arguments
from img2img_server.runtime.schedulers.noise_levels import level_at

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
PLAIN = ("DDIM", "PNDM", "Euler", "Heun", "DPM++ 2M Karras", "DPM++ SDE", "DEIS", "UniPC", "LCM", "Euler a")
FLOW = ("Euler", "Heun")
DRAWING = ("LCM", "Euler a")
"""Schedulers that draw noise."""


class Pipe:
    """The part of a pipeline that the scheduler caches use."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def get_timesteps(self, *arguments: Any) -> Any:
        """The timesteps of the scheduler's img2img pipeline."""
        flow = registry.is_flow(self.scheduler)
        kind = diffusers.StableDiffusion3Img2ImgPipeline if flow else diffusers.StableDiffusionImg2ImgPipeline
        return kind.get_timesteps(self, *arguments)


def plain() -> SchedulerCache:
    """The schedulers of a model that predicts noise."""
    return SchedulerCache(Pipe(diffusers.DDIMScheduler(**_BETAS, clip_sample=False, set_alpha_to_one=False)))


def flow() -> SchedulerCache:
    """The schedulers of a model of flow matching."""
    return FlowSchedulers(Pipe(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)))


def ask(scheduler: str | None = None, steps: int = 12, strength: float = 0.8) -> Request:
    return make_request(num_inference_steps=steps, strength=strength, scheduler=scheduler)


def called(count: int, calls: int) -> tuple[int, ...]:
    return tuple(int(number * count / calls) for number in range(calls))


def by_diffusers(whole: CachedScheduler, steps: tuple[int, ...], latents: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """The final latents by diffusers' scheduler. Call number n of the model has the output `outputs[n]`."""
    scheduler, given, original = copy.deepcopy(whole.scheduler), iter(outputs), torch.empty(0)
    arguments = step_arguments(scheduler, torch.Generator())
    for step, (index, time) in enumerate(zip(whole.indices, whole.timesteps, strict=True)):
        signal, noise = level_at(whole.scheduler, index, time)
        if registry.is_flow(whole.scheduler):  # the output is noise - image
            signal = 1.0
        if step in steps:
            output = next(given)
            original = (latents - noise * output) / signal
        else:
            output = (latents - signal * original) / noise
        latents = scheduler.step(output, time, latents, **arguments, return_dict=False)[0]
    return latents


def by_solver(part: CachedScheduler, latents: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """The final latents by the linear solver."""
    assert part.schedule is not None
    trajectory = Trajectory(part.schedule, [torch.Generator()])
    for output in outputs:
        (latents,) = advance_batch([trajectory], [latents], [output])
    return latents


@pytest.mark.parametrize(
    ("kind", "name"), [*((plain, name) for name in PLAIN if name not in DRAWING), *((flow, name) for name in FLOW)]
)
def test_a_solver_that_skips_calls_steps_as_diffusers_does_with_the_predicted_image(kind: Any, name: str) -> None:
    known = kind()
    whole = known.get(ask(name))
    assert whole.can_skip
    for calls in (1, 2, 5, len(whole.times) - 1):
        steps = called(len(whole.times), calls)
        part = known.get_part(ask(name), steps)
        assert part.times == tuple(whole.times[step] for step in steps)
        values = torch.randn(1 + calls, 1, 4, 6, 6, generator=torch.Generator().manual_seed(calls))
        expected = by_diffusers(whole, steps, values[0], values[1:])
        assert torch.allclose(
            by_solver(part, values[0], values[1:]), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )


@pytest.mark.parametrize("name", DRAWING)
def test_a_scheduler_that_draws_noise_calls_the_model_in_all_steps(name: str) -> None:
    assert not plain().get(ask(name)).can_skip


@pytest.mark.parametrize("kind", [plain, flow])
def test_noise_levels_and_positions_of_a_part_match_its_steps(kind: Any) -> None:
    known = kind()
    whole, part = known.get(ask()), known.get_part(ask(), (0, 3, 4, 7))
    steps = (0, 3, 4, 7)
    assert part.indices == tuple(whole.indices[step] for step in steps)
    assert part.levels.after == tuple(whole.levels.after[step - 1] for step in [*steps[1:], len(whole.times)])


def test_skipped_calls_change_the_result_of_a_gaussian_less_than_fewer_steps() -> None:
    """Whose denoiser is known: 12 calls in the 20 steps of the model's own scheduler, and in 12 of its steps."""
    known = plain()
    whole, part, fewer = known.get(ask(steps=25)), known.get_part(ask(steps=25), called(20, 12)), known.get(ask(steps=15))
    assert (len(whole.times), len(fewer.times)) == (20, 12)
    for spread in (0.2, 0.4, 0.8):
        exact, kept, other = (_scale(one, spread) for one in (whole, part, fewer))
        assert abs(kept - exact) < abs(other - exact)


def _scale(cached: CachedScheduler, spread: float) -> float:
    """The factor by which latents of images with the standard deviation `spread` are scaled, relative to the exact solution."""
    assert cached.schedule is not None
    trajectory, latents, exact = Trajectory(cached.schedule, [torch.Generator()]), torch.ones(1, 1, 1, 1), math.nan
    for index, time in zip(cached.indices, cached.timesteps, strict=True):
        signal, noise = level_at(cached.scheduler, index, time)
        variance = (signal * spread) ** 2 + noise**2
        if math.isnan(exact):
            exact = spread / math.sqrt(variance)
        output = (latents - signal * (signal * spread**2 / variance * latents)) / noise
        (latents,) = advance_batch([trajectory], [latents], [output])
    return float(latents) / exact

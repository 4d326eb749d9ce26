"""Compiled schedules against the oracle, diffusers' own schedulers stepped one by one in the same test."""

import copy
import functools
import inspect
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from img2img_server.runtime.schedulers.linear import LinearSolver, Trajectory, advance_batch, compile_schedule, scale_input
from img2img_server.runtime.schedulers.registry import NAMES, make
from torch_operations import Counting

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# Relative to the greatest number of the trajectory. The worst is Heun at 2 steps, for which diffusers itself subtracts numbers
# that are nearly the same and divides by the last sigma; most are below 2e-6.
TOLERANCE = 2e-5

SEEDS = (11, 12)

# One name for each class and settings; settings that are false are diffusers' defaults.
DISTINCT = {
    (class_name, *sorted((key, value) for key, value in overrides.items() if value)): name
    for name, (class_name, overrides) in NAMES.items()
}.values()

# diffusers' KDPM2 schedulers hand torch's tensors to numpy's functions.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")


@pytest.fixture(autouse=True)
def torch_as_the_pipelines_call_it() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def scheduled(scheduler: Any, steps: int, start: int) -> tuple[Any, torch.Tensor]:
    """The same as StableDiffusionImg2ImgPipeline.get_timesteps."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    return scheduler, scheduler.timesteps[start * scheduler.order :]


@functools.cache
def made(name: str, prediction_type: str) -> Any:
    return make(name, DDIMScheduler(**NOISE, prediction_type=prediction_type))


def named(name: str, steps: int, start: int = 0, prediction_type: str = "epsilon") -> tuple[Any, torch.Tensor]:
    return scheduled(copy.deepcopy(made(name, prediction_type)), steps, start)


@functools.cache
def compiled(name: str, steps: int, start: int) -> LinearSolver:
    schedule = compile_schedule(*named(name, steps, start))
    assert schedule is not None
    return schedule


def model(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Not linear, mixes channels and pixels, and depends on the timestep."""
    return torch.tanh(0.3 * sample.roll(1, -1) + 0.001 * float(timestep)) + 0.5 * sample.flip(1) / (1 + sample.abs())


def generators(seeds: Sequence[int] = SEEDS) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def first_latents(rows: int = 2, seed: int = 5) -> torch.Tensor:
    return 3 * torch.randn(rows, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def diffusers_steps(scheduler: Any, timesteps: Any, latents: torch.Tensor, draws: list[torch.Generator]) -> list[torch.Tensor]:
    """The same as the pipelines' loop, including prepare_extra_step_kwargs."""
    scheduler = copy.deepcopy(scheduler)
    accepted = inspect.signature(scheduler.step).parameters
    arguments = {name: value for name, value in {"eta": 0.0, "generator": draws}.items() if name in accepted}
    seen = []
    for timestep in timesteps:
        output = model(scale_input(scheduler, latents, timestep), timestep)
        latents = scheduler.step(output, timestep, latents, **arguments, return_dict=False)[0]
        seen.append(latents)
    return seen


def compiled_steps(schedule: LinearSolver, latents: torch.Tensor, draws: list[torch.Generator]) -> list[torch.Tensor]:
    trajectory = Trajectory(schedule, draws)
    seen = []
    for _ in schedule.steps:
        output = model(latents * trajectory.input_scale, trajectory.timestep)
        (latents,) = advance_batch([trajectory], [latents], [output])
        seen.append(latents)
    assert trajectory.memory == ()
    return seen


def assert_follows(scheduler: Any, timesteps: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    schedule = compile_schedule(scheduler, timesteps)
    assert schedule is not None
    assert len(schedule.steps) == len(schedule.input_scales) == len(timesteps)
    theirs, ours = generators(), generators()
    expected = torch.stack(diffusers_steps(scheduler, timesteps, first_latents(), theirs))
    actual = torch.stack(compiled_steps(schedule, first_latents(), ours))
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * float(expected.abs().max()))
    assert_same_state(theirs, ours)


def assert_same_state(some: list[torch.Generator], others: list[torch.Generator]) -> None:
    assert all(torch.equal(one.get_state(), other.get_state()) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("name", DISTINCT)
def test_compiled_schedule_matches_diffusers(name: str) -> None:
    for steps, start in ((1, 0), (4, 0), (4, 2), (25, 0), (25, 12), (50, 0), (50, 25)):
        assert_follows(*named(name, steps, start))


@pytest.mark.parametrize("name", DISTINCT)
def test_compiled_v_prediction_schedule_matches_diffusers(name: str) -> None:
    for steps, start in ((1, 0), (4, 2), (25, 0)):
        assert_follows(*named(name, steps, start, "v_prediction"))


@pytest.mark.parametrize(
    ("class_name", "changes"),
    [
        ("DDIMScheduler", {"clip_sample": False, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
        ("DEISMultistepScheduler", {"solver_order": 3}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistepScheduler", {"solver_type": "heun", "euler_at_final": True, "use_exponential_sigmas": True}),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3, "lower_order_final": True}),
        ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++", "lower_order_final": True}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
        ("LMSDiscreteScheduler", {}),
        ("PNDMScheduler", {}),  # With its Runge-Kutta steps.
        ("UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
        ("UniPCMultistepScheduler", {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
    ],
)
def test_compiled_schedule_of_a_models_configuration_matches_diffusers(class_name: str, changes: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, class_name)(**NOISE, **changes)
    assert_follows(*scheduled(scheduler, 21, 0), tolerance=1e-4)


@pytest.mark.parametrize(
    ("class_name", "changes"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.02}),
        ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("FlowMatchEulerDiscreteScheduler", {"use_exponential_sigmas": True}),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchLCMScheduler", {}),
    ],
)
def test_compiled_flow_matching_schedule_matches_diffusers(class_name: str, changes: dict[str, Any]) -> None:
    mu = {"mu": 0.8} if "use_dynamic_shifting" in changes else {}
    shortest = 2 if "shift_terminal" in changes else 1  # to stretch a single step diffusers divides by zero
    for steps, start in ((shortest, 0), (4, 0), (4, 2), (25, 12)):
        scheduler = getattr(diffusers, class_name)(**changes)
        scheduler.set_timesteps(steps, **mu)
        scheduler.set_begin_index(start * scheduler.order)
        assert_follows(scheduler, scheduler.timesteps[start * scheduler.order :])


@pytest.mark.parametrize("name", DISTINCT)
def test_history_length_does_not_grow_with_the_steps(name: str) -> None:
    assert compiled(name, 40, 0).history == compiled(name, 12, 0).history <= 3


@pytest.mark.parametrize("name", ["DDIM", "DPM++ 2M SDE Karras", "DPM2 a", "PNDM", "UniPC"])
def test_compiling_does_not_modify_the_scheduler(name: str) -> None:
    scheduler, timesteps = named(name, 10, 5)
    before = pickle.dumps(scheduler)
    assert compile_schedule(scheduler, timesteps) is not None
    assert pickle.dumps(scheduler) == before


class Twice(EulerAncestralDiscreteScheduler):  # type: ignore[misc]
    """Draws a second time."""

    def step(self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True) -> Any:
        torch.randn(model_output.shape, generator=generator)
        return super().step(model_output, timestep, sample, generator=generator, return_dict=return_dict)


class Elsewhere(DDIMScheduler):  # type: ignore[misc]
    """Draws from a source of its own."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        return (super().step(model_output, timestep, sample)[0] + torch.randn(sample.shape, generator=generators()[0]),)


class Hiding(DDIMScheduler):  # type: ignore[misc]
    """Has hidden state."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        kept = self.__dict__.setdefault("kept", {"sum": torch.zeros_like(sample)})
        kept["sum"] = kept["sum"] + model_output
        return (super().step(kept["sum"], timestep, sample)[0],)


class Hoarding(DDIMScheduler):  # type: ignore[misc]
    """Remembers everything."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        self.__dict__.setdefault("kept", []).append(model_output)
        return (super().step(sum(self.kept), timestep, sample)[0],)


@pytest.mark.parametrize(
    ("scheduler_class", "changes"),
    [
        (DDIMScheduler, {"clip_sample": True}),
        (DDIMScheduler, {"clip_sample": True, "clip_sample_range": 100.0}),
        (DDIMScheduler, {"clip_sample": False, "thresholding": True}),
        (diffusers.DDPMScheduler, {"clip_sample": True}),
        (diffusers.DPMSolverMultistepScheduler, {"thresholding": True}),
        # Divides by zero at the first step.
        (DDIMScheduler, {"clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
        (Twice, {}),
        (Elsewhere, {"clip_sample": False}),
        (Hiding, {"clip_sample": False}),
        (Hoarding, {"clip_sample": False}),
    ],
)
def test_unsupported_scheduler_is_not_compiled(scheduler_class: Any, changes: dict[str, Any]) -> None:
    scheduler, timesteps = scheduled(scheduler_class(**NOISE, **changes), 10, 0)
    assert compile_schedule(scheduler, timesteps) is None


def test_scheduler_that_clips_is_not_compiled_even_for_one_late_step() -> None:
    scheduler, timesteps = scheduled(DDIMScheduler(**NOISE, clip_sample=True), 50, 49)
    assert compile_schedule(scheduler, timesteps) is None


def test_noise_with_zero_weight_is_still_drawn() -> None:
    last = compiled("Euler a", 4, 0).steps[-1]
    assert last.draws
    assert last.noise == 0.0


members = st.tuples(st.sampled_from(sorted(NAMES)), st.sampled_from((1, 4, 7)), st.integers(0, 3), st.integers(1, 3))


@settings(max_examples=30, deadline=None)
@given(batch=st.lists(members, min_size=2, max_size=6), delays=st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_output_in_a_batch_equals_output_alone(batch: list[tuple[str, int, int, int]], delays: list[int]) -> None:
    schedules = [compiled(name, steps, start % steps) for name, steps, start, _ in batch]
    latents = [first_latents(rows, seed) for seed, (*_, rows) in enumerate(batch)]
    alone_draws = [generators(range(rows)) for *_, rows in batch]
    alone = [compiled_steps(*each) for each in zip(schedules, latents, alone_draws, strict=True)]
    trajectories = [Trajectory(schedule, generators(range(rows))) for schedule, (*_, rows) in zip(schedules, batch, strict=True)]
    for turn in range(max(delays) + max(len(schedule.steps) for schedule in schedules)):
        active = [
            index
            for index, trajectory in enumerate(trajectories)
            if delays[index] <= turn and trajectory.step < len(trajectory.schedule.steps)
        ]
        if not active:
            continue
        those = [trajectories[index] for index in active]
        samples = [latents[index] for index in active]
        outputs = [model(sample * each.input_scale, each.timestep) for each, sample in zip(those, samples, strict=True)]
        for index, sample in zip(active, advance_batch(those, samples, outputs), strict=True):
            latents[index] = sample
    for trajectory, draws, sample, steps in zip(trajectories, alone_draws, latents, alone, strict=True):
        torch.testing.assert_close(sample, steps[-1], rtol=0.0, atol=1e-6 * float(torch.stack(steps).abs().max()))
        assert_same_state(trajectory.generators, draws)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["DDIM", "DPM++ 2M SDE", "Euler a", "LCM", "PNDM", "UniPC"])
def test_low_precision_keeps_its_dtype_and_generator_state(name: str, dtype: torch.dtype) -> None:
    scheduler, timesteps = named(name, 4)
    theirs, ours = generators(), generators()
    expected = diffusers_steps(scheduler, timesteps, first_latents().to(dtype), theirs)[-1]
    actual = compiled_steps(compiled(name, 4, 0), first_latents().to(dtype), ours)[-1]
    assert actual.dtype == dtype
    resolution = torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0.0, atol=20 * resolution)
    assert_same_state(theirs, ours)


def operations(names: Sequence[str]) -> int:
    trajectories = [Trajectory(compiled(name, 7, 0), generators((0,))) for name in names]
    latents = [first_latents(rows=1) for _ in names]
    with Counting() as counting:
        for _ in range(7):
            latents = advance_batch(trajectories, latents, latents)
    return int(counting.count)


def test_the_number_of_operations_does_not_grow_with_the_number_of_requests() -> None:
    names = ["Euler a", "DPM++ 2M Karras", "UniPC", "PNDM"]
    assert operations(names * 6) == operations(names)

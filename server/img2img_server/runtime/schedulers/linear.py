"""diffusers' schedulers, compiled to linear coefficients, so that one call steps a batch of requests.

For fixed timesteps every common scheduler is linear: the next latents, and the few tensors that it remembers from step to step
(earlier model outputs, or the sample from which a second-order step starts), are sums of the latents, the model's output, the
remembered tensors and new noise. The coefficients depend only on the scheduler's configuration and on the step.
`compile_schedule` runs diffusers' scheduler once on unit vectors and reads the coefficients; `advance_batch` applies them to
requests with different schedulers at different steps, in a number of operations that does not depend on the number of requests. A
scheduler that is not linear (clipping, thresholding) fails a test on random numbers and is not compiled.

`skipping` makes of such a solver one that calls the model in some steps only: in the others, the image that it predicted last is
kept.
"""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from img2img_server.runtime.common.device_copy import send

SLOTS = 6
"""Maximum number of tensors that a scheduler may remember. PNDM and UniPC of order 3 need 4."""

TERMS = 2 + SLOTS
"""Number of terms: the latents, the model's output and the remembered tensors."""

_SILENT = 4
_CHANNELS = TERMS + 2 * _SILENT
"""Channels of a probe: the unit vector, then zeros, in which only noise appears, then random numbers."""

_AMPLITUDE = 1024.0
"""Length of the unit vectors: large, so that added noise does not cost digits; a power of two, so that division is exact."""

_TOLERANCE = 1e-4
"""Tolerance of the linearity test, relative to the terms. Rounding causes 1.2e-5 at worst (Heun); clipping more than 0.1."""

_NEGLIGIBLE = 1e-9
"""A coefficient below this part of its row's largest is a zero with a rounding error: float32 resolves 6e-8."""


@dataclass(frozen=True, slots=True, eq=False)
class SolverStep:
    """One step. Its terms are the latents, the model's output and `remembered` tensors; its `rows` are the new latents and the
    new combinations to remember."""

    coefficients: torch.Tensor = field(repr=False)
    """[TERMS, 1 + SLOTS], float32, on the CPU: the factor of each term in each row, padded with zeros."""
    remembered: int
    rows: int
    memory: tuple[int, ...]
    """The tensors to remember for the next step: indices into the terms, followed by the rows after the first."""
    draws: bool
    """Whether the step draws noise; its coefficient, `noise`, may be zero."""
    noise: float


@dataclass(frozen=True, slots=True, eq=False)
class LinearSolver:
    """A scheduler's steps from one timestep to the end. Immutable; shared by all requests with the same steps."""

    timesteps: torch.Tensor
    """[S], as diffusers' scheduler sets them."""
    input_scales: tuple[float, ...]
    """[S]: the factor of the latents in the model's input."""
    steps: tuple[SolverStep, ...]

    @property
    def history(self) -> int:
        """Maximum number of tensors of the latents' shape that a request remembers between two steps."""
        return max((step.remembered for step in self.steps), default=0)


@dataclass(slots=True, eq=False)
class Trajectory:
    """A request's state in a linear solver: generators (on the CPU, one per row), next step, and remembered tensors."""

    schedule: LinearSolver
    generators: list[torch.Generator]
    step: int = 0
    memory: tuple[torch.Tensor, ...] = ()

    @property
    def timestep(self) -> torch.Tensor:
        """The next timestep, a scalar. Raises IndexError after the last."""
        return self.schedule.timesteps[self.step]

    @property
    def input_scale(self) -> float:
        """The factor of the latents in the model's next input. Raises IndexError after the last step."""
        return self.schedule.input_scales[self.step]


def coefficients(trajectories: Sequence[Trajectory], sizes: Sequence[int]) -> torch.Tensor:
    """The coefficients of each trajectory's next step: [terms, rows, B], float32, on the CPU.

    B is the sum of `sizes`, the rows of latents of each of the `trajectories`, of which there is at least one. The last term is
    noise if any step draws noise. Terms that a request lacks have coefficient zero.
    """
    steps = [trajectory.schedule.steps[trajectory.step] for trajectory in trajectories]
    depth = 2 + max(len(trajectory.memory) for trajectory in trajectories)
    matrices = [step.coefficients for step, size in zip(steps, sizes, strict=True) for _ in range(size)]
    table = torch.stack(matrices, dim=-1)[:depth, : max(step.rows for step in steps)]
    if any(step.draws for step in steps):
        factors = torch.zeros_like(table[:1])
        factors[0, 0] = torch.tensor([step.noise for step, size in zip(steps, sizes, strict=True) for _ in range(size)])
        table = torch.cat([table, factors])
    return table


def advance_batch(
    trajectories: Sequence[Trajectory],
    latents: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    table: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Advances each request, of at least one, by a step: updates its memory and generators, and returns its new latents.

    `latents` and `outputs` (the model's, after guidance) are [rows, C, h, w] for each request, with any number of rows; all are
    on one device, and the latents of one dtype, which the new ones have, too. The arithmetic is float32. The returned and
    remembered tensors are views of tensors that the batch shares. `table` are the `coefficients` on that device, None to compute
    them.
    """
    steps = [trajectory.schedule.steps[trajectory.step] for trajectory in trajectories]
    terms = [
        (sample, output, *trajectory.memory) for trajectory, sample, output in zip(trajectories, latents, outputs, strict=True)
    ]
    sizes = [sample.shape[0] for sample in latents]
    noise = _draw(steps, trajectories, latents) if any(step.draws for step in steps) else None
    if table is None:
        table = send(coefficients(trajectories, sizes), latents[0].device)
    first, *others = _combine(table, terms, noise)
    rows = [torch.split(row, sizes) for row in others]
    for trajectory, step, given, *computed in zip(trajectories, steps, terms, *rows, strict=True):
        available = (*given, *computed)
        trajectory.memory = tuple(available[index] for index in step.memory)
        trajectory.step += 1
    return list(torch.split(first.to(latents[0].dtype), sizes))


def _combine(
    table: torch.Tensor, terms: Sequence[tuple[torch.Tensor, ...]], noise: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """The rows of all steps, each [B, C, h, w] for B rows of latents. `noise` [B, C, h, w] is a term of the first row."""
    depth = table.shape[0] - (noise is not None)
    # A request that lacks a term repeats its own latents, with coefficient zero: other values could be NaN.
    pieces = [given[index if index < len(given) else 0] for index in range(depth) for given in terms]
    values = torch.cat(pieces if noise is None else [*pieces, noise]).float()
    products = table[..., None, None, None] * values.view(table.shape[0], 1, -1, *values.shape[1:])
    return products.sum(0).unbind()


def _draw(steps: Sequence[SolverStep], trajectories: Sequence[Trajectory], latents: Sequence[torch.Tensor]) -> torch.Tensor:
    """The noise [B, C, h, w], on the latents' device.

    Each row is drawn from its own generator, as in diffusers' randn_tensor, but always in float32: in a smaller dtype torch draws
    the same numbers, rounded, and leaves the generator in the same state.
    """
    parts: list[torch.Tensor] = []
    for step, trajectory, sample in zip(steps, trajectories, latents, strict=True):
        shape = (1, *sample.shape[1:])
        if step.draws:
            assert len(trajectory.generators) == sample.shape[0]
            parts.extend(torch.randn(shape, generator=generator) for generator in trajectory.generators)
        else:
            parts.append(torch.zeros(sample.shape))
    return send(torch.cat(parts), latents[0].device)


@dataclass(frozen=True, slots=True, eq=False)
class SolverReading:
    """One step, before unused memory is removed. `coefficients` is [1 + slots after it, 2 + slots before it], float64."""

    coefficients: torch.Tensor
    input_scale: float
    draws: bool
    noise: float


def step_arguments(scheduler: Any, generator: torch.Generator | list[torch.Generator]) -> dict[str, Any]:
    """The arguments of a diffusers scheduler's step beside tensors, with eta 0: of those that it has."""
    accepted = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in {"eta": 0.0, "generator": generator}.items() if name in accepted}


def scale_input(scheduler: Any, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """`sample` as the model takes it. Schedulers of flow matching do not scale it."""
    scale = getattr(scheduler, "scale_model_input", None)
    scaled: torch.Tensor = sample if scale is None else scale(sample, timestep)
    return scaled


def compile_schedule(scheduler: Any, timesteps: torch.Tensor) -> LinearSolver | None:
    """The linear solver of `timesteps` [S], the last S of the scheduler's timesteps, with eta 0.

    `scheduler` is a diffusers scheduler on which set_timesteps and, if it has it, set_begin_index were called. It is not changed.
    Returns None if a step is not linear, or draws noise in an unknown way. Raises the errors of the scheduler's step.
    """
    probe = _Probe(scheduler)
    readings: list[SolverReading] = []
    for timestep in timesteps.cpu():
        reading = probe.step(timestep)
        if reading is None:
            return None
        readings.append(reading)
    return LinearSolver(timesteps, tuple(reading.input_scale for reading in readings), prune(readings))


class _Probe:
    """A copy of a scheduler, on the CPU, that is run on unit vectors.

    A probe is [1, _CHANNELS, 1, 1]. Before each step all remembered tensors are replaced by unit vectors, except their random
    channels. So a step's coefficients do not depend on earlier steps, and few channels are needed.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = copy.deepcopy(scheduler)
        for name, value in vars(self._scheduler).items():
            if isinstance(value, torch.Tensor):
                setattr(self._scheduler, name, value.cpu())
        self._noise = torch.Generator().manual_seed(0)
        self._random = torch.Generator().manual_seed(1)
        self._arguments = step_arguments(self._scheduler, self._noise)
        self._places: list[tuple[Any, Any]] = []

    def step(self, timestep: torch.Tensor) -> SolverReading | None:
        """Steps the scheduler once. Returns None if the step was not linear."""
        sample, output = self._unit(0), self._unit(1)
        given = torch.stack([sample, output, *(holder[key] for holder, key in self._places)]).flatten(1).double()
        scaled = scale_input(self._scheduler, sample.clone(), timestep).flatten().double()
        before = self._noise.get_state()
        result = self._scheduler.step(output, timestep, sample, **self._arguments, return_dict=False)[0]
        noise = self._drawn_since(before)
        self._places = self._find()
        if noise is None or len(self._places) > SLOTS:
            return None
        taken = torch.stack([result, *(holder[key] for holder, key in self._places)]).flatten(1).double()
        for index, (holder, key) in enumerate(self._places):
            holder[key] = self._unit(2 + index, holder[key])
        scale = float(scaled[0]) / _AMPLITUDE
        if not torch.allclose(scaled, scale * given[0], rtol=_TOLERANCE, atol=0.0):
            return None
        return _read(given, taken, noise, scale)

    def _unit(self, index: int, like: torch.Tensor | None = None) -> torch.Tensor:
        """A unit vector, with the random channels of `like`, or new ones."""
        vector = torch.zeros(1, _CHANNELS, 1, 1)
        vector[:, index] = _AMPLITUDE
        trial = torch.randn((1, _SILENT, 1, 1), generator=self._random) if like is None else like[:, -_SILENT:]
        vector[:, -_SILENT:] = trial
        return vector

    def _drawn_since(self, before: torch.Tensor) -> torch.Tensor | None:
        """The noise that a step drew: zeros if it drew none, None if it drew more than once or not from a normal distribution."""
        after = self._noise.get_state()
        if torch.equal(before, after):
            return torch.zeros(_CHANNELS, dtype=torch.float64)
        again = torch.Generator()
        again.set_state(before)
        noise = torch.randn((1, _CHANNELS, 1, 1), generator=again)
        return noise.flatten().double() if torch.equal(again.get_state(), after) else None

    def _find(self) -> list[tuple[Any, Any]]:
        """The places in which the scheduler remembers tensors of the probe's shape: containers and keys."""
        attributes = vars(self._scheduler)
        places: list[tuple[Any, Any]] = []
        for name, value in attributes.items():
            if _is_probe(value):
                places.append((attributes, name))
            elif isinstance(value, list):
                places.extend((value, index) for index, item in enumerate(value) if _is_probe(item))
        return places


def _is_probe(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == (1, _CHANNELS, 1, 1)


def _read(given: torch.Tensor, taken: torch.Tensor, noise: torch.Tensor, input_scale: float) -> SolverReading | None:
    """The coefficients with which `given` [terms, _CHANNELS] became `taken` [rows, _CHANNELS]; None if they do not fit."""
    silent = slice(TERMS, TERMS + _SILENT)
    draws = bool(noise.any())
    factor = float(taken[0, silent] @ noise[silent] / (noise[silent] @ noise[silent])) if draws else 0.0
    added = torch.zeros_like(taken)
    added[0] = factor * noise
    coefficients = (taken - added)[:, : len(given)] / _AMPLITUDE
    magnitudes = coefficients.abs()
    coefficients[magnitudes < _NEGLIGIBLE * magnitudes.amax(1, keepdim=True)] = 0.0
    allowed = _TOLERANCE * (coefficients.abs() @ given.abs() + added.abs())
    # Written such that NaN fails.
    if not bool(((coefficients @ given + added - taken).abs() <= allowed).all()):
        return None
    return SolverReading(coefficients, input_scale, draws, factor)


def prune(readings: Sequence[SolverReading]) -> tuple[SolverStep, ...]:
    """Removes unused memory, from the last step to the first: a step remembers only tensors that a later step uses, and computes
    only combinations that are not among its terms."""
    steps: list[SolverStep] = []
    wanted: list[int] = []
    for reading in reversed(readings):
        rows = reading.coefficients[[0, *(1 + slot for slot in wanted)]]
        used = rows[:, 2:].any(0).nonzero().flatten().tolist()
        rows = rows[:, [0, 1, *(2 + slot for slot in used)]]
        computed, memory = [rows[0]], []
        for row in rows[1:]:
            terms = row.nonzero().flatten().tolist()
            if len(terms) == 1 and row[terms[0]] == 1.0:
                memory.append(terms[0])
            else:
                memory.append(len(row) + len(computed) - 1)
                computed.append(row)
        coefficients = torch.zeros(TERMS, 1 + SLOTS)
        coefficients[: rows.shape[1], : len(computed)] = torch.stack(computed, dim=1)
        steps.append(SolverStep(coefficients, len(used), len(computed), tuple(memory), reading.draws, reading.noise))
        wanted = used
    return tuple(reversed(steps))


Predicted = tuple[float, float]
"""The factors of the latents and of the model's output in the image that it predicts."""


def skipping(solver: LinearSolver, called: Sequence[int], predicted: Sequence[Predicted]) -> LinearSolver:
    """The solver that calls the model in the steps `called`, which begin with the first, 0. Each of its steps does all of
    `solver` up to the next call. `predicted` has the factors of each step of `solver`, which draws no noise.

    A step without a call takes the output with which the model would predict the last image again. Steps remain those of the
    model's own scheduler, so images stay near to its images, whatever its error. A solver of higher order with fewer steps
    (DPM-Solver++) comes nearer to the exact solution of the differential equation, which is another image. Lines through the last
    two outputs, or through the last two predicted images, fail where these turn.
    """
    ends = [*called[1:], len(solver.steps)]
    readings = [
        SolverReading(_joined(solver.steps[begin:end], predicted[begin:end]), solver.input_scales[begin], False, 0.0)
        for begin, end in zip(called, ends, strict=True)
    ]
    return LinearSolver(solver.timesteps[list(called)], tuple(one.input_scale for one in readings), prune(readings))


def _joined(steps: Sequence[SolverStep], predicted: Sequence[Predicted]) -> torch.Tensor:
    """The coefficients of `steps` as one, as of a `SolverReading`. Terms are the latents, the output of the first step, and what
    that step remembers; rows are the new latents and what the last step remembers."""
    unit = torch.eye(2 + steps[0].remembered, dtype=torch.float64)
    latents, output, memory = unit[0], unit[1], list(unit[2:])
    image = predicted[0][0] * latents + predicted[0][1] * output
    for number, (step, (share, factor)) in enumerate(zip(steps, predicted, strict=True)):
        if number:
            output = (image - share * latents) / factor
        terms = torch.stack([latents, output, *memory])
        latents, *computed = step.coefficients[: len(terms), : step.rows].double().T @ terms
        available = [*terms, *computed]
        memory = [available[index] for index in step.memory]
    return torch.stack([latents, *memory])

"""The state of a request between two steps, and the tensors of a batch's next step."""

import copy
import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from img2img_server.bundle.speedups import Speedup
from img2img_server.engine.request import Request
from img2img_server.runtime.common.device_copy import send
from img2img_server.runtime.common.out_of_memory import KEEPERS
from img2img_server.runtime.control.controls import Control
from img2img_server.runtime.diffusion.masking import Blend
from img2img_server.runtime.image_prompts.states import PromptStates, joined
from img2img_server.runtime.lora.adapters import Choice
from img2img_server.runtime.schedulers.linear import Trajectory, coefficients, scale_input
from img2img_server.runtime.schedulers.noise_levels import predict_original

Conditioning = dict[str, torch.Tensor]
"""The UNet's inputs other than sample and timestep, by name. Each is [rows of the UNet call, ...]."""


@dataclass(frozen=True, slots=True, eq=False)
class Predicted:
    """Input of a preview: the first image's latents before a step, and the model's output, both [1, C, h, w]."""

    step: int
    input_scale: float
    sample: torch.Tensor
    output: torch.Tensor


@dataclass(slots=True, eq=False)
class DiffusionState:
    """The state of a request with n seeds between two steps.

    `latents` is [n, C, h, w], on the device. `conditioning`, on the device, has n rows, or 2n if the request is `guided`, the
    negative prompt's first; `guidance` is then the scale. `timesteps` [S] are on the CPU; `times` are the same as numbers.
    `trajectory` is its state in the linear solver; None for a scheduler that is not linear, of which it has its own copy,
    `scheduler`. `begun` is the cached scheduler, shared and never stepped; `indices` are the positions of these
    timesteps in its own. `blend` keeps the source outside the request's mask; None without one, or if the UNet reads the mask.
    With a `speedup`, `light` says which steps are light; these use the `difference` [n, C, h, w] that the prompt made in the last
    full step, and its deep `features`, with a row for each row of that step.
    """

    request: Request
    timesteps: torch.Tensor
    times: tuple[float, ...]
    latents: torch.Tensor
    conditioning: Conditioning
    generators: list[torch.Generator]
    trajectory: Trajectory | None
    guided: bool
    guidance: float
    begun: Any
    indices: tuple[int, ...]
    scheduler: Any = None
    step_arguments: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    blend: Blend | None = None
    choice: Choice | None = None
    """Its LoRAs."""
    controls: tuple[Control, ...] = ()
    """Its control images."""
    prompts: PromptStates | None = None
    """Its image prompts."""
    predicted: Predicted | None = None
    """The prediction of the last step, if a preview is due."""
    speedup: Speedup | None = None
    light: tuple[bool, ...] = ()
    difference: torch.Tensor | None = None
    features: torch.Tensor | None = None
    number: int = field(default_factory=itertools.count().__next__)
    """Unique among all states."""

    @property
    def images(self) -> int:
        """The number of images: the rows of its latents."""
        return len(self.generators)

    @property
    def is_light(self) -> bool:
        """Whether the next step is light."""
        return self.step < len(self.light) and self.light[self.step]

    @property
    def has_two(self) -> bool:
        """Whether the next step has two rows for an image."""
        return self.guided and not (self.is_light and self.speedup is not None and self.speedup.keeps_guidance)

    @property
    def rows(self) -> int:
        """Its number of rows in the UNet's next call."""
        return len(self.generators) * (2 if self.has_two else 1)

    @property
    def next_conditioning(self) -> Conditioning:
        """The conditioning of the rows of the next call."""
        if not self.guided or self.has_two:
            return self.conditioning
        return {name: tensor[self.images :] for name, tensor in self.conditioning.items()}

    @property
    def next_features(self) -> torch.Tensor:
        """The deep features of the rows of the next, light call."""
        assert self.features is not None, "the first step is full"
        return self.features[-self.rows :]

    @property
    def step_count(self) -> int:
        """The number of UNet calls."""
        return len(self.times)

    @property
    def timestep(self) -> torch.Tensor:
        """The next timestep, a scalar."""
        return self.timesteps[self.step]

    @property
    def preview_is_due(self) -> bool:
        """Whether a preview was requested for the next step."""
        interval = self.request.preview_interval
        return interval > 0 and (self.step + 1) % interval == 0

    @property
    def input_scale(self) -> float:
        """The factor by which the next step's latents are scaled for the UNet."""
        if self.trajectory is not None:
            return self.trajectory.input_scale
        return float(scale_input(copy.copy(self.scheduler), torch.ones(1), self.timestep))

    @property
    def applying(self) -> list[tuple[Control, float]]:
        """The controls that apply to the next step, with their scales."""
        scaled = [(control, control.scale(self.step, self.step_count)) for control in self.controls]
        return [(control, scale) for control, scale in scaled if scale]

    @property
    def needs_control_graph(self) -> bool:
        """Whether the next step cannot be a call of the plain graph."""
        return self.prompts is not None or bool(self.applying)

    def original(self) -> torch.Tensor | None:
        """The latents without noise that the last step predicted for the first image, [1, C, h, w]; None if no preview is due or
        the scheduler's prediction type is unknown."""
        seen = self.predicted
        if seen is None:
            return None
        index, timestep = self.indices[seen.step], self.timesteps[seen.step]
        drawn = predict_original(self.begun, index, timestep, seen.sample, seen.output, seen.input_scale)
        if drawn is None or self.blend is None:
            return drawn
        return drawn * self.blend.redrawn[:1] + self.blend.original[:1]

    def unscaled(self) -> torch.Tensor:
        """The UNet's input [n, C, h, w], before the `input_scale` of a trajectory is applied."""
        if self.trajectory is not None:
            return self.latents
        return scale_input(self.scheduler, self.latents, self.timestep)


class JoinedConditioning:
    """Caches the concatenated conditioning of batches while their states do not change. Keeps the last batch, and up to `most`
    that take up to `most_bytes` together."""

    owner: Hashable = None

    def __init__(self, most: int = 4, most_bytes: int = 2**29) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._kept: dict[tuple[tuple[int, bool], ...], Conditioning] = {}
        KEEPERS.add(self)

    def get(self, states: Sequence[DiffusionState]) -> Conditioning:
        """The rows of all states, concatenated in order, by name, and those of their image prompts, if any state has some. The
        tensors must not be changed."""
        key = tuple((state.number, state.has_two) for state in states)
        known = self._kept.get(key)
        if known is None:
            rows = [(state.rows - state.images, state.images, state.prompts) for state in states]
            known = _join([state.next_conditioning for state in states]) | joined(rows)
            self._make_room(_bytes_of(known))
            self._kept[key] = known
        return dict(known)

    def _make_room(self, size: int) -> None:
        """Frees the oldest batches until one of so many bytes can be kept."""
        while kept := list(self._kept.values()):  # another thread may free them
            if len(kept) < self._most and size + sum(map(_bytes_of, kept)) <= self._most_bytes:
                break
            self._kept.pop(next(iter(self._kept), ()), None)

    def forget(self, state: DiffusionState) -> None:
        """Frees the batches that include `state`."""
        for key in list(self._kept):
            if any(number == state.number for number, _ in key):
                self._kept.pop(key, None)

    def give_back(self) -> None:
        """Frees all batches. Called on any thread, such as one that runs out of memory while it loads a model."""
        self._kept.clear()


def _bytes_of(batch: Conditioning) -> int:
    return sum(tensor.nbytes for tensor in batch.values())


def _join(parts: Sequence[Conditioning]) -> Conditioning:
    """Concatenates the rows of each name; sequences of different lengths are padded with zeros. Tensors of one dtype are copied
    in one operation."""
    joined: Conditioning = {}
    targets: dict[torch.dtype, list[torch.Tensor]] = {}
    sources: dict[torch.dtype, list[torch.Tensor]] = {}
    for name, first in parts[0].items():
        rows = [part[name] for part in parts]
        sizes = [len(each) for each in rows]
        lengths = [each.shape[1] for each in rows if each.ndim > 1]
        if len(set(lengths)) > 1:
            joined[name] = first.new_zeros((sum(sizes), max(lengths), *first.shape[2:]))
            parts_of_it = torch.split(joined[name], sizes)
            targets.setdefault(first.dtype, []).extend(
                target[:, :length] for target, length in zip(parts_of_it, lengths, strict=True)
            )
        else:
            joined[name] = first.new_empty((sum(sizes), *first.shape[1:]))
            targets.setdefault(first.dtype, []).extend(torch.split(joined[name], sizes))
        sources.setdefault(first.dtype, []).extend(rows)
    for dtype, into in targets.items():
        torch._foreach_copy_(into, sources[dtype])
    return joined


Noise = tuple[torch.Tensor, ...]
"""The UNet's predictions for a state, each [n, C, h, w]: one, or if guided two, for the negative prompt and the prompt."""


def split_noise(states: Sequence[DiffusionState], rows: torch.Tensor) -> Sequence[Noise]:
    """Divides the rows of the UNet's output by state. A guided state with one row for an image has the difference that the prompt
    made in its last full step, which is kept there."""
    pieces = iter(torch.split(rows, [state.images for state in states for _ in range(2 if state.has_two else 1)]))
    noises: list[Noise] = []
    for state in states:
        first = next(pieces)
        if state.has_two:
            noises.append((first, next(pieces)))
            if state.speedup is not None and state.speedup.keeps_guidance:
                state.difference = noises[-1][1] - first
        elif state.guided:
            assert state.difference is not None, "the first step is full"
            noises.append((first - state.difference, first))
        else:
            noises.append((first,))
    return noises


def guide(states: Sequence[DiffusionState], noises: Sequence[Noise], guidance: torch.Tensor) -> Sequence[torch.Tensor]:
    """Applies `guidance`, [B, 1, 1, 1] for the B images of all states, to the noise. Returns [n, C, h, w] for each state.

    The number of operations does not depend on the number of states.
    """
    if not any(state.guided for state in states):
        return [noise[0] for noise in noises]
    unconditional, text = torch.cat([noise[index] for index in (0, -1) for noise in noises]).chunk(2)
    guided = torch.addcmul(unconditional, text.sub_(unconditional), guidance)
    return torch.split(guided.to(text.dtype), [state.images for state in states])


Key = tuple[tuple[int, int], ...]
"""The number and the step of each state."""


@dataclass(frozen=True, slots=True, eq=False)
class StepNumbers:
    """The parameters of the next step of a batch: B images, R rows of the UNet's call. Tensors are float32, on the device.

    `timesteps` [R], `scales` [R] of the latents, `guidance` [B, 1, 1, 1], and `table`, the coefficients [terms, rows, b] of the b
    images with a linear solver, None if b is 0. `is_scaled`: some scale is not 1.
    """

    key: Key
    timesteps: torch.Tensor
    scales: torch.Tensor
    guidance: torch.Tensor
    table: torch.Tensor | None
    is_scaled: bool

    @classmethod
    def of(cls, states: Sequence[DiffusionState], device: torch.device) -> "StepNumbers":
        """The parameters of the next step of `states`, in one copy to `device`."""
        times: list[float] = []
        scales: list[float] = []
        guidance: list[float] = []
        for state in states:
            times += [state.times[state.step]] * state.rows
            # A scheduler that is not linear scales the latents itself.
            scales += [1.0 if state.trajectory is None else state.trajectory.input_scale] * state.rows
            guidance += [state.guidance] * state.images
        numbers = torch.tensor([*times, *scales, *guidance], dtype=torch.float32)
        followed = [state for state in states if state.trajectory is not None]
        table = None
        if followed:
            table = coefficients([state.trajectory for state in followed if state.trajectory], [each.images for each in followed])
            numbers = torch.cat([numbers, table.flatten()])
        rows, images = len(times), len(guidance)
        parts = torch.split(send(numbers, device), [rows, rows, images, len(numbers) - 2 * rows - images])
        return cls(
            key_of(states),
            parts[0],
            parts[1],
            parts[2][:, None, None, None],
            None if table is None else parts[3].view(table.shape),
            any(scale != 1.0 for scale in scales),
        )


def key_of(states: Sequence[DiffusionState]) -> Key:
    """A key that identifies the next step of `states`."""
    return tuple((state.number, state.step) for state in states)

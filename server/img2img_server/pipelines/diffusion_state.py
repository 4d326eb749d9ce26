"""What a Stable Diffusion pipeline keeps of a request between two steps."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from img2img_server.engine.request import Request
from img2img_server.pipelines.originals import predict_original
from img2img_server.pipelines.schedules import Trajectory
from img2img_server.pipelines.transfers import per_row

Conditioning = dict[str, torch.Tensor]
"""The UNet's inputs beside sample and timestep, by name. Each is [rows of the UNet call, ...]."""


@dataclass(frozen=True, slots=True, eq=False)
class Predicted:
    """What a preview is drawn from: the first image's latents before a step, and the model's output, both [1, C, h, w]."""

    step: int
    input_scale: float
    sample: torch.Tensor
    output: torch.Tensor


@dataclass(slots=True, eq=False)
class DiffusionState:
    """A request between two steps. With n seeds, `latents` is [n, C, h, w]; where it is `guided`, by a second row in the UNet's
    call, conditioning has 2n rows, the negative prompt's first. `scheduler` is its own where it has no compiled schedule to
    follow as its `trajectory`; `begun` is the one that was set for these timesteps, shared and never stepped. Latents and
    conditioning are on the device, timesteps on the CPU."""

    request: Request
    timesteps: torch.Tensor
    latents: torch.Tensor
    conditioning: Conditioning
    generators: list[torch.Generator]
    trajectory: Trajectory | None
    guided: bool
    begun: Any
    scheduler: Any = None
    step_arguments: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    predicted: Predicted | None = None
    """Of the last step, if a preview is due."""

    @property
    def step_count(self) -> int:
        """How often the UNet is called for it."""
        return len(self.timesteps)

    @property
    def timestep(self) -> torch.Tensor:
        """The timestep that is next."""
        return self.timesteps[self.step]

    @property
    def preview_is_due(self) -> bool:
        """Whether the next step is one of those that a preview was asked of."""
        interval = self.request.preview_interval
        return interval > 0 and (self.step + 1) % interval == 0

    @property
    def input_scale(self) -> float:
        """The factor by which the next step's latents are scaled for the UNet."""
        if self.trajectory is not None:
            return self.trajectory.input_scale
        return float(copy.copy(self.scheduler).scale_model_input(torch.ones(1), self.timestep))

    def original(self) -> torch.Tensor | None:
        """The latents without noise that the last step predicted for the first image, [1, C, h, w]; None if a preview is not due
        or the scheduler does not say what its model predicts."""
        seen = self.predicted
        if seen is None:
            return None
        index = len(self.begun.timesteps) - len(self.timesteps) + seen.step
        return predict_original(self.begun, index, self.timesteps[seen.step], seen.sample, seen.output, seen.input_scale)

    def unscaled(self) -> tuple[torch.Tensor, float]:
        """A tensor [n, C, h, w] and the factor that makes it the UNet's input."""
        if self.trajectory is not None:
            return self.latents, self.trajectory.input_scale
        return self.scheduler.scale_model_input(self.latents, self.timestep), 1.0


def guide(states: Sequence[DiffusionState], noises: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Applies each state's guidance to its rows of the UNet's output: [n or 2n, C, h, w] to [n, C, h, w].

    The number of operations does not grow with that of the states.
    """
    if not any(state.guided for state in states):
        return noises
    halves = [noise.chunk(2) if state.guided else (noise, noise) for state, noise in zip(states, noises, strict=True)]
    unconditional, text = torch.cat([half[index] for index in range(2) for half in halves]).chunk(2)
    sizes = [len(half) for half, _ in halves]
    scales = [state.request.guidance_scale for state, size in zip(states, sizes, strict=True) for _ in range(size)]
    guided = torch.addcmul(unconditional, text.sub_(unconditional), per_row(scales, text.device))
    return torch.split(guided.to(text.dtype), sizes)

"""The numbers of a step: timesteps, scales, guidance and coefficients of a whole batch, which reach the device in one copy."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from img2img_server.runtime.common.device_copy import send
from img2img_server.runtime.diffusion.state import DiffusionState
from img2img_server.runtime.schedulers.linear import coefficients

Key = tuple[tuple[int, int], ...]
"""Which states, and at which steps."""


@dataclass(frozen=True, slots=True, eq=False)
class StepNumbers:
    """The next step of a batch of B images, which are R rows of the UNet's call. All are in float32 and on the device.

    `timesteps` [R], `scales` [R] of the latents, `guidance` [B, 1, 1, 1], and `table`, the coefficients [terms, rows, b] of those
    images whose schedules are compiled, None if there are none. `is_scaled` says whether any scale is not 1.
    """

    key: Key
    timesteps: torch.Tensor
    scales: torch.Tensor
    guidance: torch.Tensor
    table: torch.Tensor | None
    is_scaled: bool

    @classmethod
    def of(cls, states: Sequence[DiffusionState], device: torch.device) -> "StepNumbers":
        """Those of `states`, sent to `device`."""
        times: list[float] = []
        scales: list[float] = []
        guidance: list[float] = []
        for state in states:
            times += [state.times[state.step]] * state.rows
            # A scheduler without a compiled schedule scales the latents itself.
            scales += [1.0 if state.trajectory is None else state.trajectory.input_scale] * state.rows
            guidance += [state.request.guidance_scale] * state.images
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
    """What tells the next step of `states` from any other."""
    return tuple((state.number, state.step) for state in states)

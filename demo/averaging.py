"""Exponential moving average of weights: the averaged weights are what gets saved."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Parameter


class MovingAverage:
    """Follows parameters with a decay that grows from 0.1 to its limit, so that early steps are forgotten."""

    def __init__(self, parameters: Iterable[Parameter], decay: float) -> None:
        self._parameters = list(parameters)
        self._averages = [parameter.detach().clone() for parameter in self._parameters]
        self._decay = decay
        self._steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters; call it after each optimizer step."""
        self._steps += 1
        decay = min(self._decay, self._steps / (self._steps + 9))
        torch._foreach_lerp_(self._averages, [p.detach() for p in self._parameters], 1 - decay)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Overwrite the parameters with their averages."""
        for parameter, average in zip(self._parameters, self._averages, strict=True):
            parameter.copy_(average)

    def state_dict(self) -> dict[str, Any]:
        """The averages and the number of updates."""
        return {"averages": self._averages, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned for parameters of the same shapes."""
        self._averages, self._steps = list(state["averages"]), int(state["steps"])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages in place for the length of a block, then restore the parameters."""
        kept = [parameter.detach().clone() for parameter in self._parameters]
        self.copy_to_parameters()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, kept, strict=True):
                    parameter.copy_(value)

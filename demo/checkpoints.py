"""Training that survives the loss of its process: everything that a stage changes is saved together and restored together.

Random numbers come from the seed and the step's number, so they need not be saved.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch


class Stateful(Protocol):
    """What torch's modules and optimizers have."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, in tensors and plain values."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take over a state."""
        ...


class Checkpoint:
    """A file with the states of named parts and the number of steps done."""

    def __init__(self, path: Path, parts: Mapping[str, Stateful]) -> None:
        self._path = path
        self._parts = dict(parts)

    def restore(self) -> int:
        """Load all parts if the file exists; return the number of steps done, else 0. Loads tensors and plain values only."""
        if not self._path.exists():
            return 0
        saved = torch.load(self._path, weights_only=True)
        for name, part in self._parts.items():
            part.load_state_dict(saved["parts"][name])
        return int(saved["step"])

    def save(self, step: int) -> None:
        """Replace the file in one step, so that a lost process leaves the old or the new one."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        torch.save({"step": step, "parts": {name: part.state_dict() for name, part in self._parts.items()}}, partial)
        partial.replace(self._path)

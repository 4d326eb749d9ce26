"""Bounds the modules that are constructed from a model's configuration by the content of its weight files.

A configuration of a few bytes can describe terabytes of weights or a hundred million layers, which the libraries construct before
they read the files. Modules are loaded in `within`: construction fails as soon as it exceeds the files.
"""

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.modules import module

from img2img_server.bundle.files import read_safetensors_header

_SLACK_NUMBERS, _SLACK_PARTS = 2**24, 4096
_NUMBERS, _PARTS = 4, 16
"""Factors: a class may register tied weights twice and replace some; each tensor comes with a few modules and buffers."""


class TooLarge(ValueError):
    """A configuration describes more than the files beside it hold."""


@dataclass(slots=True)
class _Budget:
    """The numbers and parts that may still be constructed."""

    numbers: int
    parts: int

    def spend(self, tensor: Any) -> None:
        """Counts one part and its numbers. Raises TooLarge."""
        self.parts -= 1
        self.numbers -= tensor.numel() if isinstance(tensor, torch.Tensor) else 0
        if self.parts < 0 or self.numbers < 0:
            raise TooLarge(_TEXT.format("more parts" if self.parts < 0 else "more weights"))


_TEXT = (
    "its config.json describes {} than its safetensors files hold (a size or a number of layers is too large): "
    "download config.json and weights of the same model"
)
_current = threading.local()


@contextmanager
def within(files: Iterable[Path]) -> Iterator[None]:
    """Bounds the weights and parts of modules that this thread constructs in the block by the safetensors `files`, with room for
    weights that are registered twice and for small modules without weights.

    Raises TooLarge, a ValueError, from the module's construction, also if the system cannot allocate a tensor.
    """
    tensors = numbers = 0
    for path in files:
        count, size = _measure(path)
        tensors, numbers = tensors + count, numbers + size
    outer = getattr(_current, "budget", None)
    _current.budget = _Budget(_NUMBERS * numbers + _SLACK_NUMBERS, _PARTS * tensors + _SLACK_PARTS)
    try:
        yield
    except MemoryError:
        raise TooLarge(_TEXT.format("more weights")) from None
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise TooLarge(_TEXT.format("more weights")) from None
    finally:
        _current.budget = outer


def _measure(path: Path) -> tuple[int, int]:
    """The number of tensors in a safetensors file and of the numbers in them; its library checks the header. Raises
    ValueError."""
    try:
        read_safetensors_header(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; download it again") from None
    try:
        with safe_open(path, "pt") as weights:
            shapes = [weights.get_slice(key).get_shape() for key in weights.keys()]  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}; download it again") from None
    return len(shapes), sum(map(math.prod, shapes))


def _count(owner: Any, name: str, part: Any) -> None:
    if (budget := getattr(_current, "budget", None)) is not None:
        budget.spend(part)


for _register in (
    module.register_module_parameter_registration_hook,
    module.register_module_buffer_registration_hook,
    module.register_module_module_registration_hook,
):
    _register(_count)

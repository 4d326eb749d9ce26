"""Bounds what a model's class may build by what the model's files hold.

A configuration of a few bytes can ask for terabytes of weights or for a hundred million layers, which the libraries build before
they look at the files. Whoever loads a module does so in `within`: construction ends as soon as it exceeds the files.
"""

import math
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.modules import module

from img2img_server.bundle.files import MOST_HEADER, MOST_TENSORS

_SLACK_NUMBERS, _SLACK_PARTS = 2**24, 4096
_NUMBERS, _PARTS = 4, 16
"""A class may register weights twice (tied ones), and replace some; a tensor has some modules, buffers and lists around it."""


class TooLarge(ValueError):
    """A configuration describes more than the files beside it hold."""


@dataclass(slots=True)
class _Budget:
    """What is left to be built."""

    numbers: int
    parts: int

    def spend(self, tensor: Any) -> None:
        """Counts one part, and the numbers in it. Raises TooLarge."""
        self.parts -= 1
        self.numbers -= tensor.numel() if isinstance(tensor, torch.Tensor) else 0
        if self.parts < 0 or self.numbers < 0:
            raise TooLarge(_TEXT.format("more parts" if self.parts < 0 else "more weights"))


_TEXT = (
    "its config.json describes {} than its safetensors files hold (a size or a number of layers is too large): "
    "get config.json and weights of one model"
)
_current = threading.local()


@contextmanager
def within(files: Iterable[Path]) -> Iterator[None]:
    """Modules that this thread builds in the block may have no more weights and parts than the safetensors `files` hold, with
    room for weights that a class registers twice and for small modules without any.

    Raises TooLarge, a ValueError, out of the module's construction, and where the system has no memory for a tensor.
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
    """The tensors that a safetensors file holds, and the numbers in them; its library checks the header. Raises ValueError."""
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        if length > MOST_HEADER or file.read(length).count(b"data_offsets") > MOST_TENSORS:
            raise ValueError(f"{path} has a header of more than {MOST_HEADER} bytes or {MOST_TENSORS} tensors: get it again")
    try:
        with safe_open(path, "pt") as weights:
            shapes = [weights.get_slice(key).get_shape() for key in weights.keys()]  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}; get it again") from None
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

"""How much memory models take: measured on the process and its GPU, estimated before that, and given back."""

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from img2img_server.bundle.manifest import Manifest
from img2img_server.errors import ShuttingDown
from img2img_server.support.device_lock import DEVICE_IN_USE

_STATM = Path("/proc/self/statm")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_RESIDENT = 1
"""Which number of /proc/self/statm counts the pages that are in memory."""
_FACTOR = 1.7
"""Of a model's bytes in memory to those of its weights, before it was measured. ONNX Runtime's CPU provider took 1.05 times the
weights of matrices and 2.07 times those of convolutions, which are about three fifths of Stable Diffusion 1.5's UNet."""
_M_ARENA_MAX = -8
"""Of malloc.h."""
_FIXED = 32 * 2**20
"""Bytes of tokenizers, graphs and arenas, whatever the weights."""
_ON_GPU = ("cuda", "tensorrt")
"""What engines on a GPU are called behind the colon, such as "onnx:cuda"."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Bytes in use: the process's resident memory, and those of the GPU, None if PyTorch uses none. `gpu_free` are the GPU's
    bytes that are not in use, whoever uses the others."""

    host: int
    gpu: int | None = None
    gpu_free: int | None = None

    @property
    def gpu_total(self) -> int | None:
        """The bytes of the GPU, None if none is used."""
        return None if self.gpu is None or self.gpu_free is None else self.gpu + self.gpu_free

    def grown_to(self, later: "Reading", engine: str) -> int | None:
        """Bytes that came in use until `later`, negative for fewer, where `engine` computes; None where that is not known."""
        if engine.rpartition(":")[2] not in _ON_GPU:
            return later.host - self.host
        return None if self.gpu is None or later.gpu is None else later.gpu - self.gpu


class Meter(Protocol):
    """Measures the memory that is in use."""

    def read(self) -> Reading:
        """How much is in use now."""
        ...


class ProcessMeter:
    """Asks the system about this process, and PyTorch, if it is there and uses a GPU, about that. Not yet run on a GPU, but on
    fake CUDA libraries."""

    def read(self) -> Reading:
        """How much is in use now. It asks the GPU too, so not on a thread that must not wait while a model is loaded."""
        gpu = _gpu_bytes()
        return Reading(resident_bytes()) if gpu is None else Reading(resident_bytes(), *gpu)


def resident_bytes() -> int:
    """The bytes of this process that are in memory."""
    return int(_STATM.read_text(encoding="ascii").split()[_RESIDENT]) * _PAGE


def _gpu_bytes() -> tuple[int, int] | None:
    """The bytes in use of the GPU, whoever uses them, and those that are free. None if PyTorch has not begun to use one: asking
    would begin it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    with DEVICE_IN_USE:
        free, total = torch.cuda.mem_get_info()
    return int(total - free), int(free)


def weight_bytes(manifest: Manifest) -> int:
    """The bytes of a bundle's weights."""
    return sum(component.bytes for component in manifest.components)


def estimate(manifest: Manifest) -> int:
    """The bytes that a model is expected to take before it was ever loaded."""
    return int(weight_bytes(manifest) * _FACTOR) + _FIXED


def measured(grown: int | None, manifest: Manifest) -> int:
    """The bytes that a model takes by what memory has grown by while it was loaded.

    Others may have given memory back meanwhile: of less than half of the weights, which is what an fp32 bundle takes in
    bfloat16, nothing is believed, and the estimate stands for it.
    """
    if grown is None or grown < weight_bytes(manifest) // 2:
        return estimate(manifest)
    return max(grown, 1)


def bound_arenas() -> None:
    """Limits the C library to two arenas of memory, unless MALLOC_ARENA_MAX is set. Call it before threads start.

    By default there are up to 8 for each core, and no thread uses again what large messages left behind in another's arena.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; musl and others have none
    if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(_M_ARENA_MAX, 2)


def give_back() -> None:
    """Returns memory that nothing refers to any more to the system, as far as Python, PyTorch and the C library hold it."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl and others have none
    if trim is not None:
        trim(0)


class Closable(Protocol):
    """Something that is given up once."""

    def close(self) -> None:
        """Gives it up."""
        ...


def let_go(last: list[Closable], run: Callable[[Callable[[], None]], None]) -> None:
    """Closes what is in `last` by `run`, which calls what it is given on the thread that runs the models, and returns its memory
    to the system and the device. The list is empty afterwards.

    So no session ends in the middle of a call, or while a call is recorded. Blocks; if the engine stops, it is closed here.
    """

    def close() -> None:
        while last:
            last.pop().close()

    try:
        run(close)
    except ShuttingDown:
        close()
    with DEVICE_IN_USE:
        give_back()


def in_words(count: int) -> str:
    """Bytes for people: "3.4 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"

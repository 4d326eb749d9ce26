"""Memory of models: measured on the process and its GPU, estimated before the first load, and freed."""

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from img2img_server.bundle.manifest import Component, Manifest
from img2img_server.engine.request import Pipeline
from img2img_server.errors import ShuttingDown
from img2img_server.support.device_lock import DEVICE_IN_USE

_STATM = Path("/proc/self/statm")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_RESIDENT = 1
"""Index of the resident pages in /proc/self/statm."""
_FACTOR = 1.7
"""Estimated ratio of a model's memory to the bytes of its weights. ONNX Runtime's CPU provider took 1.05 times the weights of
matrices and 2.07 times those of convolutions, which are about three fifths of Stable Diffusion 1.5's UNet."""
_M_ARENA_MAX = -8
"""mallopt's parameter in malloc.h."""
_FIXED = 32 * 2**20
"""Estimated bytes of tokenizers, graphs and arenas."""
_ON_GPU = ("cuda", "tensorrt")
"""The last parts of the names of engines on a GPU, such as "onnx:cuda"."""


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """Memory in use, in bytes: `host` is the process's resident memory; `gpu` and `gpu_free` are the used and the free memory of
    the GPU, by all processes, None if PyTorch uses no GPU."""

    host: int
    gpu: int | None = None
    gpu_free: int | None = None

    @property
    def gpu_total(self) -> int | None:
        """The GPU's total memory in bytes, None if no GPU is used."""
        return None if self.gpu is None or self.gpu_free is None else self.gpu + self.gpu_free

    def grown_to(self, later: "MemoryReading", engine: str) -> int | None:
        """The growth until `later` in bytes, on the device of `engine`; None if unknown."""
        if engine.rpartition(":")[2] not in _ON_GPU:
            return later.host - self.host
        return None if self.gpu is None or later.gpu is None else later.gpu - self.gpu


class Meter(Protocol):
    """Measures memory."""

    def read(self) -> MemoryReading:
        """How much is in use now."""
        ...


class ProcessMeter:
    """Measures this process's memory, and the GPU's if PyTorch uses it. Run on fake CUDA libraries, not yet on a GPU."""

    def read(self) -> MemoryReading:
        """Measures the memory in use. Waits while a model is loaded on the GPU."""
        gpu = _gpu_bytes()
        return MemoryReading(resident_bytes()) if gpu is None else MemoryReading(resident_bytes(), *gpu)


def resident_bytes() -> int:
    """This process's resident memory in bytes."""
    return int(_STATM.read_text(encoding="ascii").split()[_RESIDENT]) * _PAGE


def _gpu_bytes() -> tuple[int, int] | None:
    """The used and free bytes of the GPU; None if PyTorch has not initialized CUDA, which the query would do."""
    if not uses_gpu():
        return None
    with DEVICE_IN_USE:
        free, total = sys.modules["torch"].cuda.mem_get_info()
    return int(total - free), int(free)


def session_bytes(weights: int) -> int:
    """The estimated memory of a graph with so many bytes of weights: each session has its own copy of them."""
    return int(weights * _FACTOR)


@dataclass(frozen=True, slots=True)
class Estimates:
    """Estimates the memory of models in bytes on their device. With `loras` their LoRA graphs are opened, too; weights
    of the components for which `offloads` is true are not on a GPU."""

    loras: bool = False
    offloads: Callable[[str], bool] = lambda component: False

    def weights(self, manifest: Manifest) -> int:
        """The size of a bundle's weights."""
        return sum(component.bytes for component in self._counted(manifest))

    def memory(self, manifest: Manifest) -> int:
        """A model's memory before its first load."""
        adapted = sum(component.bytes for component in self._counted(manifest) if self.loras and component.lora in manifest.files)
        return session_bytes(self.weights(manifest) + adapted) + _FIXED

    def measured(self, manifest: Manifest, grown: int | None) -> int:
        """A model's memory, from the growth while it was loaded."""
        return measured(grown, self.weights(manifest), self.memory(manifest))

    def _counted(self, manifest: Manifest) -> list[Component]:
        return [component for component in manifest.components if not (uses_gpu() and self.offloads(component.name))]


PLAIN = Estimates()
"""The estimates of a server without LoRAs and offload."""


def uses_gpu() -> bool:
    """Whether PyTorch has initialized CUDA, as the server does at its start if models may run on a GPU."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_available() and torch.cuda.is_initialized())


def measured(grown: int | None, weights: int, estimated: int) -> int:
    """The memory in bytes of what has so many bytes of `weights`, from the growth while it was loaded.

    If memory was freed meanwhile, the growth is too small. A growth below half of the weights (an fp32 bundle in bfloat16) is not
    plausible, so the estimate is used instead.
    """
    return estimated if grown is None or grown < weights // 2 else max(grown, 1)


def least_slots(pipeline: Pipeline) -> int:
    """The memory in bytes of a pipeline's slots for LoRAs of the least padded rank, made or not; 0 if it takes none."""
    return int(getattr(pipeline, "least_slot_bytes", 0))


def unopened(pipeline: Pipeline) -> int:
    """The bytes of weights of a pipeline's control graph if the graph is not open yet; 0 without one."""
    return int(getattr(pipeline, "unopened_bytes", 0))


def opened_later(pipeline: Pipeline | None) -> int:
    """The memory in bytes of the graphs that a pipeline opened when calls needed them, about; 0 if it opens none."""
    return int(getattr(pipeline, "opened_bytes", 0))


def bound_arenas() -> None:
    """Limits the C library to two arenas of memory, unless MALLOC_ARENA_MAX is set. Call it before threads start.

    By default there are up to 8 per core, and a thread does not reuse the memory that large messages left in another's arena.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; musl and others have none
    if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(_M_ARENA_MAX, 2)


def give_back() -> None:
    """Returns unreferenced memory of Python, PyTorch and the C library to the system."""
    gc.collect()
    if uses_gpu():
        sys.modules["torch"].cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl and others have none
    if trim is not None:
        trim(0)


def let_go(last: list[Pipeline], run: Callable[[Callable[[], None]], None]) -> None:
    """Closes and frees the pipelines in `last`, which must hold the last references, and empties the list.

    `run` calls a function on the thread that runs the models, so that no session ends during a call or a recording. If the engine
    has stopped, the pipelines are closed on this thread. Blocks.
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
    """A number of bytes as text: "3.4 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"

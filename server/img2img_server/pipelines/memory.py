"""Recognizes what torch and ONNX Runtime raise when there is no room: it says more of how much was asked than of who asked."""

import logging
import traceback
from typing import Protocol
from weakref import WeakSet

import torch
from onnxruntime.capi import onnxruntime_pybind11_state as state

from img2img_server.errors import OutOfMemory

_log = logging.getLogger(__name__)

RUNTIME_ERRORS = (RuntimeError, MemoryError, state.Fail, state.RuntimeException, state.EPFail)
"""What calls of torch and ONNX Runtime raise for want of memory, among much else."""


class Keeper(Protocol):
    """Something that keeps device memory for later."""

    def give_back(self) -> None:
        """Frees what it keeps, as far as it is not in use. Raises nothing."""
        ...


KEEPERS: WeakSet[Keeper] = WeakSet()
"""All that keep device memory in this process, beside torch."""

_SIGNS = (
    "out of memory",  # CUDA itself: "CUDA failure 2: out of memory", "CUDA error: out of memory"
    "failed to allocate memory for requested buffer",  # ONNX Runtime's arena
    "is smaller than requested bytes",  # the same, at its limit
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "device_allocation_failed",  # cuDNN 9
    "bad_alloc",
    "can't allocate memory",  # torch, on the CPU
    "not enough memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that an allocation failed."""
    if isinstance(error, OutOfMemory | MemoryError | torch.OutOfMemoryError):
        return True
    message = str(error).lower()
    return any(sign in message for sign in _SIGNS)


def out_of_memory(error: Exception) -> OutOfMemory | None:
    """The error to raise in place of `error`, from None, where an allocation failed; None where it is another's.

    What the failed call's frames hold is let go, and ONNX Runtime's sessions and torch give back to the device what they keep for
    later: the same call with less to do, or another's, may need it. So nothing of the failed call is left but this module's log
    line.
    """
    if isinstance(error, OutOfMemory):
        return error
    if not is_out_of_memory(error):
        return None
    _log.warning("out of memory: %s", str(error).partition("\n")[0])
    traceback.clear_frames(error.__traceback__)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for keeper in list(KEEPERS):
            keeper.give_back()
        torch.cuda.empty_cache()
    return OutOfMemory("the device ran out of memory")

"""Recognizes what torch and ONNX Runtime raise when memory runs out."""

import logging
import traceback
from collections.abc import Hashable
from typing import Protocol
from weakref import WeakSet

import torch
from onnxruntime.capi import onnxruntime_pybind11_state as state

from img2img_server.errors import OutOfMemory

_log = logging.getLogger(__name__)

RUNTIME_ERRORS = (RuntimeError, MemoryError, state.Fail, state.RuntimeException, state.EPFail)
"""What calls of torch and ONNX Runtime raise for want of memory, among much else."""


class Keeper(Protocol):
    """Something that keeps device memory for later. `owner` stands for its model; without one it keeps little."""

    owner: Hashable

    def give_back(self) -> None:
        """Frees what it keeps, as far as it is not in use. Raises nothing."""
        ...


KEEPERS: WeakSet[Keeper] = WeakSet()
"""All that keep device memory in this process, beside torch."""

_OWN, _ALL = 1, 2
_given_back: dict[Hashable, int] = {}
"""Of each model that ran out of memory, and whose calls have all run out since: whose memory was given back."""

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


def out_of_memory(error: Exception, owner: Hashable = None) -> OutOfMemory | None:
    """The error to raise instead of `error`, from None, if an allocation failed; None for other errors.

    What the failed call's frames hold is let go, and what is kept for later is given back to the device: by torch and the
    sessions of the model `owner`, and by those of all models if the next call of `owner` runs out of memory, too (None: at once).
    So other models keep their recordings unless their memory is needed. Called on the thread that runs the models, or before it
    starts.
    """
    if isinstance(error, OutOfMemory):
        return error
    if not is_out_of_memory(error):
        return None
    _log.warning("out of memory: %s", str(error).partition("\n")[0])
    traceback.clear_frames(error.__traceback__)
    full = OutOfMemory("the device ran out of memory")
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        full.again = _give_back(owner)
        torch.cuda.empty_cache()
    return full


def worked(owner: Hashable) -> None:
    """Notes that a call of the model `owner` had enough memory."""
    if _given_back:
        _given_back.pop(owner, None)


def _give_back(owner: Hashable) -> bool:
    """Has sessions give back what they keep: those of `owner`, and the next time all. Returns whether that had not been tried."""
    keepers, before = list(KEEPERS), _given_back.get(owner, 0)
    own = [keeper for keeper in keepers if keeper.owner in (owner, None)]
    only_own = owner is not None and before < _OWN and len(own) < len(keepers)
    for keeper in own if only_own else keepers:
        keeper.give_back()
    _given_back[owner] = _OWN if only_own else _ALL
    return bool(keepers) and before < _ALL

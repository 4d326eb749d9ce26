"""Recognizes out-of-memory errors of torch and ONNX Runtime, and frees cached device memory."""

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
"""The classes of out-of-memory errors of torch and ONNX Runtime; other failures use them, too."""


class Keeper(Protocol):
    """An object that caches device memory. `owner` identifies its model; None for small caches."""

    owner: Hashable

    def give_back(self) -> None:
        """Frees its cached memory that is not in use. Does not raise."""
        ...


KEEPERS: WeakSet[Keeper] = WeakSet()
"""All caches of device memory in this process, except torch's."""

_OWN, _ALL = 1, 2
_given_back: dict[Hashable, int] = {}
"""The caches that were freed (_OWN or _ALL), by model that ran out of memory in its last call."""

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

    Clears the failed call's frames and frees cached device memory: torch's and that of the sessions of the model `owner`; if the
    next call of `owner` fails, too, that of all models (with `owner` None, all at once). So other models keep their recordings
    unless their memory is needed. Call it on the thread that runs the models, or before it starts.
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
    """Records that a call of the model `owner` had enough memory."""
    if _given_back:
        _given_back.pop(owner, None)


def _give_back(owner: Hashable) -> bool:
    """Frees the caches of `owner`, or all if that was done before. Returns whether a retry may succeed."""
    keepers, before = list(KEEPERS), _given_back.get(owner, 0)
    own = [keeper for keeper in keepers if keeper.owner in (owner, None)]
    only_own = owner is not None and before < _OWN and len(own) < len(keepers)
    for keeper in own if only_own else keepers:
        keeper.give_back()
    _given_back[owner] = _OWN if only_own else _ALL
    return bool(keepers) and before < _ALL

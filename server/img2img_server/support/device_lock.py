"""Coordination of device use: a lock against changes during CUDA graph recording, and flags of a thread: to record at the first
call, and that calls are measured."""

import contextlib
import threading
from collections.abc import Iterator

DEVICE_IN_USE = threading.Lock()
"""Held while a call is recorded (runtime/providers/cuda_graphs.py), and by other threads while they allocate or free device
memory, such as to load or unload a pipeline: allocation breaks a recording. A process uses one device, so there is one lock."""

_AT_ONCE = threading.local()
_MEASURING = threading.local()


@contextlib.contextmanager
def recording_at_once() -> Iterator[None]:
    """Within the block (warm-up), this thread records each shape at its first call."""
    _AT_ONCE.on = True
    try:
        yield
    finally:
        _AT_ONCE.on = False


def records_at_once() -> bool:
    """Whether this thread is in a block of `recording_at_once`."""
    return getattr(_AT_ONCE, "on", False)


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Within the block, this thread measures calls: what faster calls would use is opened at once, not in the background."""
    _MEASURING.on = True
    try:
        yield
    finally:
        _MEASURING.on = False


def is_measuring() -> bool:
    """Whether this thread is in a block of `measuring`."""
    return getattr(_MEASURING, "on", False)

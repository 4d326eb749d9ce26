"""Rules for all that use the device: what may not happen while a call is recorded, and when calls are recorded at once."""

import contextlib
import threading
from collections.abc import Iterator

DEVICE_IN_USE = threading.Lock()
"""Held while a call is recorded (runtime/providers/cuda_graphs.py), and by other threads while they allocate or free device
memory, as when a pipeline is loaded or unloaded: either would break the other. A process has one device, so there is one lock."""

_AT_ONCE = threading.local()


@contextlib.contextmanager
def recording_at_once() -> Iterator[None]:
    """Within the block, this thread records each shape at its first call: it warms up."""
    _AT_ONCE.on = True
    try:
        yield
    finally:
        _AT_ONCE.on = False


def records_at_once() -> bool:
    """Whether this thread is in a block of `recording_at_once`."""
    return getattr(_AT_ONCE, "on", False)

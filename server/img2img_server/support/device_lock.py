"""Coordination of device use: a lock against changes during CUDA graph recording, and flags of a thread: to record at the first
call, and that calls are measured."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

DEVICE_IN_USE = threading.Lock()
"""Held while a call is recorded (runtime/providers/cuda_graphs.py), and by other threads while they allocate or free device
memory, such as to load or unload a pipeline: allocation breaks a recording. A process uses one device, so there is one lock."""


class _ThreadFlag(threading.local):
    """A flag of the current thread."""

    on = False

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Within the block, the flag is on."""
        before, self.on = self.on, True
        try:
            yield
        finally:
            self.on = before


_AT_ONCE, _MEASURING = _ThreadFlag(), _ThreadFlag()


def recording_at_once() -> AbstractContextManager[None]:
    """Within the block (warm-up), this thread records each shape at its first call."""
    return _AT_ONCE.raised()


def records_at_once() -> bool:
    """Whether this thread is in a block of `recording_at_once`."""
    return _AT_ONCE.on


def measuring() -> AbstractContextManager[None]:
    """Within the block, this thread measures calls: what faster calls would use is opened at once, not in the background."""
    return _MEASURING.raised()


def is_measuring() -> bool:
    """Whether this thread is in a block of `measuring`."""
    return _MEASURING.on

"""Giving memory back between the stages of an export, so that their peaks don't add up."""

import contextlib
import ctypes
import gc


def give_back() -> None:
    """Frees what only cycles hold, and returns to the system what the allocator keeps for later."""
    gc.collect()
    # glibc's own; another C library may not have it.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)

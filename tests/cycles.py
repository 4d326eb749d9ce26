"""Disables the garbage collector, to test that objects are freed at once, without cycles."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Cycles are not looked for within the block."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

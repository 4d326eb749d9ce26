"""Without the search for cycles: what is gone at once, and what only when Python looks for it."""

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

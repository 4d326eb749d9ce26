"""A time limit of a block on the event loop, with an error of our own."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


@asynccontextmanager
async def time_limit(seconds: float | None, error: Callable[[], Exception]) -> AsyncIterator[None]:
    """Cancels the block after `seconds` (None: no limit) and raises the error that `error` makes. The block's own TimeoutErrors
    pass through."""
    try:
        async with asyncio.timeout(seconds) as timeout:
            yield
    except TimeoutError:
        if not timeout.expired():
            raise
        raise error() from None

"""Ends work early: background work when it is cancelled, a block on the event loop after a time."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager


class Stopped(Exception):
    """The work was cancelled before it was done."""


class Stop:
    """A cancellation flag that is set once and never reset."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._enders: list[Callable[[], object]] = []

    @property
    def asked(self) -> bool:
        """Whether cancellation was requested."""
        return self._event.is_set()

    def ask(self) -> None:
        """Requests cancellation, and calls the functions registered by `ending`."""
        with self._lock:
            self._event.set()
            enders = list(self._enders)
        for end in enders:
            end()

    def check(self) -> None:
        """Raises Stopped if cancellation was requested."""
        if self.asked:
            raise Stopped

    def wait(self, seconds: float) -> None:
        """Waits up to `seconds`. Raises Stopped if cancellation is requested."""
        self._event.wait(seconds)
        self.check()

    @contextlib.contextmanager
    def ending(self, end: Callable[[], object]) -> Iterator[None]:
        """Registers `end` within the block: `ask` calls it, or it is called at once if cancellation was requested before.

        `end` is called from any thread, must not block, and must tolerate that its work is already done.
        """
        with self._lock:
            self._enders.append(end)
            asked = self.asked
        if asked:
            end()
        try:
            yield
        finally:
            with self._lock:
                self._enders.remove(end)


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

"""Cancellation of background work, from any thread."""

import contextlib
import threading
from collections.abc import Callable, Iterator


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

"""Asking what takes long to end: one value that whoever works in the background looks at, from any thread."""

import contextlib
import threading
from collections.abc import Callable, Iterator


class Stopped(Exception):
    """The work was asked to end before it was done."""


class Stop:
    """A request to end, made once and never taken back."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._enders: list[Callable[[], object]] = []

    @property
    def asked(self) -> bool:
        """Whether the work is to end."""
        return self._event.is_set()

    def ask(self) -> None:
        """Asks for the end, and ends what `ending` knows of."""
        with self._lock:
            self._event.set()
            enders = list(self._enders)
        for end in enders:
            end()

    def check(self) -> None:
        """Raises Stopped where the work is to end."""
        if self.asked:
            raise Stopped

    def wait(self, seconds: float) -> None:
        """Waits, `seconds` at most. Raises Stopped where the work is to end."""
        self._event.wait(seconds)
        self.check()

    @contextlib.contextmanager
    def ending(self, end: Callable[[], object]) -> Iterator[None]:
        """While the block runs, asking also calls `end`; where it was asked before, `end` is called at once.

        `end` is called from any thread, must not block, and may find that its work is done already.
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

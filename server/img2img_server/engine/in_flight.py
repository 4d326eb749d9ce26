"""Which calls of models have not come back, for whoever has to notice one that never does."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from img2img_server.engine.stats import ModelCall


class Abandoned(Exception):
    """The engine was given up: who comes back from a call has nothing more to do."""


class CallsInFlight:
    """Remembers the call that each thread is in. Takes no lock, as it is used around every call; any thread may look."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._calls: dict[int, tuple[float, str, str, int, int]] = {}
        self._abandoned = False

    @contextmanager
    def call(self, stage: str, model: str, requests: int = 1, rows: int = 1) -> Iterator[None]:
        """Within the block this thread is in a call of a model."""
        thread = threading.get_ident()
        self._calls[thread] = (self._clock(), stage, model, requests, rows)
        try:
            yield
        finally:
            self._calls.pop(thread, None)

    def forget(self, thread: threading.Thread) -> None:
        """Leaves out the call of a thread in whose place another works: it is no reason to give up the device."""
        if thread.ident is not None:
            self._calls.pop(thread.ident, None)

    @property
    def longest(self) -> ModelCall | None:
        """The call that has taken longest so far, None between calls."""
        calls = list(self._calls.values())  # a copy in one go: no thread comes between
        if not calls:
            return None
        begun, stage, model, requests, rows = min(calls)
        return ModelCall(stage, model, requests, rows, self._clock() - begun)

    def abandon(self) -> None:
        """Has `check` raise from now on."""
        self._abandoned = True

    def check(self) -> None:
        """Raises Abandoned where nobody waits any more for what a call would give."""
        if self._abandoned:
            raise Abandoned

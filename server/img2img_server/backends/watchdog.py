"""Notices an engine whose thread does not come back from a call of a model."""

import threading
import time
from collections.abc import Callable

from img2img_server.engine.engine import Engine

_SELDOM = 1.0
"""Seconds between two looks, at the most; a tenth of what a call may take where that is less."""

_PAUSE = 4
"""Looks that are missed in a row before the process counts as paused: fewer are a busy machine."""


class Watchdog:
    """Looks every now and then at how long the engine has been in its current call; says so once where that is more than
    `seconds`. `stuck` gets a line that says what it was, on the watchdog's own thread. With 0 seconds it never looks.

    Time in which the watchdog itself did not run (SIGSTOP, a suspended machine) counts for no call. `clock` is the engine's, in
    seconds.
    """

    def __init__(
        self, engine: Engine, seconds: float, stuck: Callable[[str], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._engine = engine
        self._seconds = seconds
        self._stuck = stuck
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="img2img-watchdog", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        if self._seconds > 0:
            self._thread.start()

    def stop(self) -> None:
        """Looks no more: once it returns, `stuck` is not called. Harmless where it was never started, and from within `stuck`."""
        self._stopped.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        every = min(_SELDOM, self._seconds / 10)
        looked = self._clock()
        pauses: list[tuple[float, float]] = []  # when each ended, and how long it was
        while not self._stopped.wait(every):
            call, now = self._engine.current_call, self._clock()
            missed, looked = now - looked - every, now
            if call is None:
                pauses = []
                continue
            if missed > _PAUSE * every:
                pauses.append((now, missed))
            if call.seconds - sum(missed for ended, missed in pauses if ended > now - call.seconds) > self._seconds:
                rows = f"{call.rows} {'row' if call.rows == 1 else 'rows'}"
                self._stuck(
                    f"the device does not answer: {call.stage} of model '{call.model}' ({rows}) has taken {call.seconds:.0f} s, "
                    f"the most is {self._seconds:g} s"
                )
                return

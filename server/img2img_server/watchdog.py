"""Notices an engine whose thread does not come back from a call of a model."""

import threading
from collections.abc import Callable

from img2img_server.engine.engine import Engine

_SELDOM = 1.0
"""Seconds between two looks, at the most; a tenth of what a call may take where that is less."""


class Watchdog:
    """Looks every now and then at how long the engine has been in its current call; says so once where that is more than
    `seconds`. `stuck` gets a line that says what it was, on the watchdog's own thread. With 0 seconds it never looks.
    """

    def __init__(self, engine: Engine, seconds: float, stuck: Callable[[str], object]) -> None:
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
        while not self._stopped.wait(min(_SELDOM, self._seconds / 10)):
            call = self._engine.current_call
            if call is not None and call.seconds > self._seconds:
                rows = f"{call.rows} {'row' if call.rows == 1 else 'rows'}"
                self._stuck(
                    f"the device does not answer: {call.stage} of model '{call.model}' ({rows}) has taken {call.seconds:.0f} s, "
                    f"the most is {self._seconds:g} s"
                )
                return

"""Notices an engine whose thread does not come back from a call of a model."""

from collections.abc import Callable

from img2img_server.engine.engine import Engine


class Watchdog:
    """Looks every now and then at how long the engine has been in its current call; says so once where that is more than
    `seconds`. `stuck` gets a line that says what it was, on the watchdog's own thread. With 0 seconds it never looks.
    """

    def __init__(self, engine: Engine, seconds: float, stuck: Callable[[str], object]) -> None:
        self._engine = engine
        self._seconds = seconds
        self._stuck = stuck

    def start(self) -> None:
        """Begins to look."""

    def stop(self) -> None:
        """Looks no more."""

"""What the service sees of an engine, whether it runs in this process or elsewhere."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from img2img_server.engine.admission import Slot
from img2img_server.engine.request import Listener, Request
from img2img_server.engine.stats import Accepted, EngineStats


class EngineInterface(Protocol):
    """Takes requests and runs them: the Engine of this process, or a front's, which sends them to replicas."""

    @property
    def clock(self) -> Callable[[], float]:
        """What deadlines are measured on, in seconds."""
        ...

    @property
    def stats(self) -> EngineStats:
        """How busy it is; any thread may ask."""
        ...

    def arriving(self, client: str = "") -> AbstractContextManager[Slot]:
        """Within the block a request of `client` holds a place. Raises at once where there is none."""
        ...

    def submit(self, request: Request, listener: Listener, place: Slot | None = None) -> Accepted:
        """Accepts a request, whose events go to `listener`, exactly one ending among them. Raises at once where it cannot be
        taken."""
        ...

"""What others see of an engine, in this process or elsewhere: its interface, its statistics, and spans of its calls."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from img2img_server.engine.admission import Slot
from img2img_server.engine.request import Listener, Request, Ticket


@dataclass(frozen=True, slots=True)
class Span:
    """A stage that ran on the engine's thread from `start` for `seconds`, on the engine's clock. `members` are the `requests`
    that shared it."""

    stage: str
    model: str
    requests: int
    rows: int
    start: float
    seconds: float
    members: tuple[Request, ...] = ()


def ignore(span: Span) -> None:
    """Observes nothing."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """What the caller learns at once: the ticket, how many wait before it, and the estimated seconds until it is done."""

    ticket: Ticket
    position: int
    eta: float | None


@dataclass(frozen=True, slots=True)
class ModelCall:
    """A call of a model that has not come back: its stage, how many requests and rows are in it, and its seconds so far."""

    stage: str
    model: str
    requests: int
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class EngineStats:
    """How busy the engine is.

    Requests that wait and that are in progress, the estimated seconds of what they still need, None where costs are unknown,
    and the seconds that the current call of a model has taken so far, 0 between two calls. `arriving` requests are still being
    read and decoded. `call` is the current call.
    """

    waiting: int
    active: int
    work_seconds: float | None
    call_seconds: float
    arriving: int = 0
    call: ModelCall | None = None


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

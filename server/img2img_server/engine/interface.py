"""The interface of an engine, in this process or in a cluster, its statistics, and spans of its calls."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from img2img_server.engine.admission import Slot
from img2img_server.engine.request import Listener, Request, Ticket


@dataclass(frozen=True, slots=True)
class Span:
    """A stage that ran on the engine's thread from `start` for `seconds`, on the engine's clock. `members` are the requests that
    shared it."""

    stage: str
    model: str
    requests: int
    rows: int
    start: float
    seconds: float
    members: tuple[Request, ...] = ()


def ignore(span: Span) -> None:
    """The default observer: does nothing."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """An accepted request's ticket, the number of requests before it, and the estimated seconds until it is done."""

    ticket: Ticket
    position: int
    eta: float | None


@dataclass(frozen=True, slots=True)
class ModelCall:
    """A call of a model that has not returned: its stage, how many requests and rows are in it, and its seconds so far."""

    stage: str
    model: str
    requests: int
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class EngineStats:
    """How busy the engine is.

    `waiting` and `active` count requests; `arriving` counts those still being read and decoded. `work_seconds` is the estimated
    work of all waiting and active requests, None if costs are unknown. `call` is the current call of a model, None between two
    calls, and `call_seconds` its duration so far, 0 between two calls.
    """

    waiting: int
    active: int
    work_seconds: float | None
    call_seconds: float
    arriving: int = 0
    call: ModelCall | None = None


class EngineInterface(Protocol):
    """Accepts requests and runs them: the Engine in this process, or the Front, which sends them to replicas."""

    @property
    def clock(self) -> Callable[[], float]:
        """The monotonic clock of deadlines, in seconds."""
        ...

    @property
    def stats(self) -> EngineStats:
        """How busy the engine is. Thread-safe."""
        ...

    def reserve(self, client: str = "") -> AbstractContextManager[Slot]:
        """Reserves a slot for a request of `client` within the block. Raises if there is none."""
        ...

    def submit(self, request: Request, listener: Listener, slot: Slot | None = None) -> Accepted:
        """Accepts a request. Its events go to `listener`, exactly one ending among them. Raises if the request is refused."""
        ...

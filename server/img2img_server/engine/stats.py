"""What the engine answers at once: that a request is accepted, and how busy it is."""

from dataclasses import dataclass

from img2img_server.engine.request import Ticket


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

"""What is remembered of a call while it runs, to be told once it has ended: nothing is computed of it on the engine's thread."""

import time
from dataclasses import dataclass, field

from img2img_server.engine.engine import Accepted
from img2img_server.engine.interface import Span
from img2img_server.engine.request import Completed, Event, Failed, Request, Ticket, Timings
from img2img_server.support.call import Call

MOST_STEPS = 100
"""Steps of a request that are remembered one by one: as many as the default of --max-steps. A trace of thousands helps nobody."""


@dataclass(slots=True)
class Outcome:
    """How a call ended: the name of its gRPC status, the reason of its ErrorInfo, and whose it was."""

    status: str = "OK"
    reason: str = ""
    client: str = ""


@dataclass(slots=True, eq=False)
class RequestTrace:
    """Follows one request through the engine.

    `steps` are the calls of the denoiser that it took part in, the first MOST_STEPS of `step_count`; `stepped` is when the last
    of all ended; `codecs` are the calls that encoded and decoded it, by stage. Where it has ended, `ended` is when, and there are
    `timings` and `pictures`, or the `error`'s reason. Times are of time.monotonic, the engine's clock.
    """

    request: Request
    ticket: Ticket | None = None
    steps: list[Span] = field(default_factory=list)
    step_count: int = 0
    stepped: float = 0.0
    codecs: dict[str, Span] = field(default_factory=dict)
    ended: float | None = None
    timings: Timings | None = None
    pictures: int = 0
    error: str = ""

    def tell(self, event: Accepted | Event) -> None:
        """Takes notice of an event. Quick: the engine's thread calls it for all but the first."""
        if isinstance(event, Accepted):
            self.ticket = event.ticket
        elif isinstance(event, Completed):
            self.ended, self.timings, self.pictures = time.monotonic(), event.timings, len(event.images)
        elif isinstance(event, Failed):
            self.ended, self.error = time.monotonic(), event.error.reason

    def note(self, span: Span) -> None:
        """Takes notice of a stage that the request took part in."""
        if span.stage == "denoise":
            self.step_count += 1
            if self.step_count <= MOST_STEPS:
                self.steps.append(span)
            self.stepped = span.start + span.seconds
        elif span.stage in ("prepare", "finish"):
            self.codecs[span.stage] = span


@dataclass(slots=True, eq=False)
class Record:
    """A call that runs: when it began, on time.monotonic, how it ended, and the trail of its request, if it has one."""

    call: Call
    began: float
    outcome: Outcome = field(default_factory=Outcome)
    trail: RequestTrace | None = None

    @property
    def token(self) -> str:
        """The name of the token that admitted the call, "" for none. An address is no name: there is no end to those."""
        return "" if self.outcome.client == self.call.client else self.outcome.client

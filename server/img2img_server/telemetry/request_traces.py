"""Records of a call while it runs, for metrics and traces at its end. The engine's thread only stores events."""

import time
from dataclasses import dataclass, field

from img2img_server.engine.engine import Accepted
from img2img_server.engine.interface import Span
from img2img_server.engine.request import Completed, Event, Failed, Request, Ticket, Timings
from img2img_server.support.call import Call

MOST_STEPS = 100
"""Maximum steps of a request that are recorded individually: the default of --max-steps."""


@dataclass(slots=True)
class Outcome:
    """A call's outcome: the name of its gRPC status, the reason of its ErrorInfo, and its client."""

    status: str = "OK"
    reason: str = ""
    client: str = ""


@dataclass(slots=True, eq=False)
class RequestTrace:
    """The events of one request in the engine.

    `steps` are the denoiser's calls that it took part in, the first MOST_STEPS of `step_count`; `stepped` is the end of the last
    one; `codecs` are the calls that encoded and decoded it, by stage. After its end `ended` is set, and `timings` and the number
    of `images`, or the `error`'s reason, and the name
    of the `speedup` that it ran with. Times are of time.monotonic, the engine's clock.
    """

    request: Request
    ticket: Ticket | None = None
    steps: list[Span] = field(default_factory=list)
    step_count: int = 0
    stepped: float = 0.0
    codecs: dict[str, Span] = field(default_factory=dict)
    ended: float | None = None
    timings: Timings | None = None
    images: int = 0
    error: str = ""
    speedup: str = ""

    def record(self, event: Accepted | Event) -> None:
        """Records an event. Fast, because it runs on the engine's thread."""
        if isinstance(event, Accepted):
            self.ticket = event.ticket
        elif isinstance(event, Completed):
            self.ended, self.timings, self.images = time.monotonic(), event.timings, len(event.images)
            self.speedup = "" if event.speedup is None else event.speedup.name
        elif isinstance(event, Failed):
            self.ended, self.error = time.monotonic(), event.error.reason

    def record_span(self, span: Span) -> None:
        """Records a stage that the request took part in."""
        if span.stage == "denoise":
            self.step_count += 1
            if self.step_count <= MOST_STEPS:
                self.steps.append(span)
            self.stepped = span.start + span.seconds
        elif span.stage in ("prepare", "finish"):
            self.codecs[span.stage] = span


@dataclass(slots=True, eq=False)
class Record:
    """A call: its start on time.monotonic, its outcome, and the trace of its request, if it has one."""

    call: Call
    began: float
    outcome: Outcome = field(default_factory=Outcome)
    trace: RequestTrace | None = None

    @property
    def token(self) -> str:
        """The name of the call's token, "" for none. Client addresses are not used (unbounded cardinality)."""
        return "" if self.outcome.client == self.call.client else self.outcome.client

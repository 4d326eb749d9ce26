"""What the engine did when, for whoever wants to know: traces, metrics."""

from dataclasses import dataclass

from img2img_server.engine.request import Request


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

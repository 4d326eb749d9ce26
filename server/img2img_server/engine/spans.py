"""What the engine did when, for whoever wants to know: traces, metrics."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """A stage that ran on the engine's thread from `start` for `seconds`, on the engine's clock."""

    stage: str
    model: str
    requests: int
    rows: int
    start: float
    seconds: float


def ignore(span: Span) -> None:
    """Observes nothing."""

"""Trying again what failed, but not at every request: each time it waits twice as long."""

from dataclasses import dataclass

_FIRST = 5.0
_MOST = 300.0
_DOUBLINGS = 10
"""More would be beyond the most in any case."""


@dataclass(slots=True)
class Backoff:
    """How often something failed in a row, why it last did, and until when it is not tried again. Times in seconds."""

    failures: int = 0
    until: float = float("-inf")
    reason: str = ""

    def count(self, now: float, reason: str) -> None:
        """Notes a failure."""
        self.until = now + min(_MOST, _FIRST * 2 ** min(self.failures, _DOUBLINGS))
        self.failures += 1
        self.reason = reason

    def clear(self) -> None:
        """Notes that it worked, or that it is to be tried at once."""
        self.failures, self.until = 0, float("-inf")

    def left(self, now: float) -> float:
        """Seconds until it may be tried again, 0 where it may be now."""
        return max(0.0, self.until - now)

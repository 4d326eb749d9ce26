"""How much one client has used of what it may: calls in progress, and calls per minute. No locks: one event loop uses it."""

from dataclasses import dataclass

from img2img_server.access.tokens import Token
from img2img_server.errors import ClientBusy, Exhausted, RateLimited

_BURST_SECONDS = 10.0
"""So many seconds' worth of calls may come at once, after a pause."""
_BUSY_SECONDS = 1.0
"""When to come back while others of the same client's calls run: nobody knows when the first of them ends."""


@dataclass(slots=True)
class Usage:
    """`running` calls of a client, and a bucket that fills as time goes by: each call takes one from it.

    `level` is how much was in it at `at`, in calls and seconds; None while it is full as no call came yet.
    """

    running: int = 0
    level: float | None = None
    at: float = 0.0

    def refusal(self, token: Token, now: float) -> Exhausted | None:
        """Why a call of `token` would be refused at `now`, in seconds; None where it would not."""
        if token.concurrency is not None and self.running >= token.concurrency:
            calls = "1 call" if token.concurrency == 1 else f"{token.concurrency} calls"
            return ClientBusy(f"'{token.name}' already has {calls} in progress, its maximum", _BUSY_SECONDS)
        if token.requests_per_minute is not None and (level := self._level(token.requests_per_minute, now)) < 1:
            wait = (1 - level) * 60 / token.requests_per_minute
            return RateLimited(f"'{token.name}' exceeded its limit of {token.requests_per_minute} calls per minute", wait)
        return None

    def begin(self, token: Token, now: float) -> None:
        """Counts a call that was not refused."""
        if token.requests_per_minute is not None:
            self.level = self._level(token.requests_per_minute, now) - 1
            self.at = now
        self.running += 1

    def end(self) -> None:
        """Counts a call that has ended, however it did."""
        self.running -= 1

    def _level(self, per_minute: int, now: float) -> float:
        burst = max(1.0, per_minute * _BURST_SECONDS / 60)
        return burst if self.level is None else min(burst, self.level + (now - self.at) * per_minute / 60)

"""Which replica a request goes to: arithmetic on what replicas told last and on what was sent to them since."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_EACH = 1.0
"""Seconds that a request counts where no replica has told what one takes."""


@dataclass(slots=True)
class Standing:
    """What one front knows of one replica.

    `seconds` of work it told it has, None where it does not know and infinite where it is stuck, of `requests` requests;
    `resident` are the models it has in memory, or is loading; `coming` those that it was sent requests for since, which it loads
    where it must. `sent` are the requests of this front that are there now, `sent_then` those that
    were when it told. `each` is what one of them takes. `chosen` is when it was last chosen, by a count of choices.
    """

    seconds: float | None = None
    requests: int = 0
    resident: frozenset[str] = frozenset()
    coming: set[str] = field(default_factory=set)
    sent: int = 0
    sent_then: int = 0
    each: float = _EACH
    chosen: int = 0
    told: dict[str, Any] = field(default_factory=dict)

    def tell(self, stats: dict[str, Any]) -> None:
        """Takes what `stats_of` made at the replica. The same once more is no news."""
        if not stats or stats == self.told:
            return
        self.told = dict(stats)
        self.seconds, self.requests = stats["seconds"], stats["requests"]
        self.resident = frozenset(stats["resident"])
        self.coming.clear()
        self.sent_then = self.sent
        if self.requests and self.seconds and math.isfinite(self.seconds):
            self.each = self.seconds / self.requests

    @property
    def queued_seconds(self) -> float:
        """Seconds of work that it should have by now."""
        told = self.seconds if self.seconds is not None else self.requests * self.each
        return max(0.0, told + (self.sent - self.sent_then) * self.each)


def stats_of(seconds: float | None, requests: int, resident: Iterable[str]) -> dict[str, Any]:
    """What a replica tells of itself, as plain values that Ray passes on."""
    return {"seconds": None if seconds is None else round(seconds, 3), "requests": requests, "resident": sorted(resident)}


def choose(standings: dict[str, Standing], model: str, spread_after: float) -> str | None:
    """The replica that is to run a request of `model`: the one with the least work of those that have the model in memory.

    One that would have to load it first counts as `spread_after` seconds busier. Equals take turns. None where there is none.
    """

    def cost(name: str) -> tuple[float, int, int]:
        standing = standings[name]
        there = not model or model in standing.resident or model in standing.coming
        absent = 0.0 if there else spread_after
        return standing.queued_seconds + absent, standing.sent, standing.chosen

    return min(standings, key=cost, default=None)

"""Load balancing and autoscaling: arithmetic on the load that replicas report, and on the requests sent since.

Independent of Ray: Serve sends this module's code to its routers and to its controller.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_EACH = 1.0
"""Assumed seconds of a request if no replica has reported its cost."""


@dataclass(slots=True)
class ReplicaState:
    """A front's view of one replica.

    It has last reported `seconds` of work (None if unknown, infinite if it is stuck) of `requests` requests, and the `resident`
    models, in memory or loading. `coming` are models of requests sent since, which it may be loading. `sent` is the number of
    this front's requests on it now, `sent_then` at the time of the report. `each` is the estimated seconds of one request.
    `chosen` is the number of the last choice of it.
    """

    seconds: float | None = None
    requests: int = 0
    resident: frozenset[str] = frozenset()
    coming: set[str] = field(default_factory=set)
    sent: int = 0
    sent_then: int = 0
    each: float = _EACH
    chosen: int = 0
    reported: dict[str, Any] = field(default_factory=dict)

    def update(self, stats: dict[str, Any]) -> None:
        """Updates the view by the result of `stats_of` on the replica. A repeated report is ignored."""
        if not stats or stats == self.reported:
            return
        self.reported = dict(stats)
        self.seconds, self.requests = stats["seconds"], stats["requests"]
        self.resident = frozenset(stats["resident"])
        self.coming.clear()
        self.sent_then = self.sent
        if self.requests and self.seconds and math.isfinite(self.seconds):
            self.each = self.seconds / self.requests

    @property
    def queued_seconds(self) -> float:
        """The estimated current seconds of work."""
        reported = self.seconds if self.seconds is not None else self.requests * self.each
        return max(0.0, reported + (self.sent - self.sent_then) * self.each)


def stats_of(seconds: float | None, requests: int, resident: Iterable[str]) -> dict[str, Any]:
    """A replica's report for routers, as plain values that Ray transfers."""
    return {"seconds": None if seconds is None else round(seconds, 3), "requests": requests, "resident": sorted(resident)}


def choose(states: dict[str, ReplicaState], model: str, spread_after: float) -> str | None:
    """The replica for a request of `model`: the one with the least work. A replica without the model in memory counts as
    `spread_after` seconds busier. Equal ones are chosen in turn. None if there are no replicas."""

    def cost(name: str) -> tuple[float, int, int]:
        state = states[name]
        has_model = not model or model in state.resident or model in state.coming
        absent = 0.0 if has_model else spread_after
        return state.queued_seconds + absent, state.sent, state.chosen

    return min(states, key=cost, default=None)


QUEUED_SECONDS = "queued_seconds"
"""The name of the metric that replicas report to the controller (`record_autoscaling_stats`)."""
_SLACK = 0.5
"""Maximum share of the target after scaling down: otherwise the next request would scale up again."""


def wanted(queued: Sequence[float], current: int, target: float) -> int:
    """The number of replicas, at least one, for the `queued` seconds of work of each replica.

    Scales up from `current` if replicas have more than `target` seconds each; scales down only if the remaining ones would have
    at most half of it.
    """
    total = sum(queued)
    most, fewest = math.ceil(total / target), max(1, math.ceil(total / (target * _SLACK)))
    return most if most > current else min(current, fewest)


class QueuedSecondsPolicy:
    """Serve's autoscaling policy, called with an AutoscalingContext about ten times a second. Serve applies bounds and delays."""

    def __init__(self, target: float) -> None:
        self._target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas, and an empty state."""
        reported = latest((context.raw_metrics or {}).get(QUEUED_SECONDS, {}))
        if not reported:
            return context.target_num_replicas, {}
        return wanted(reported, context.target_num_replicas, self._target), {}


def latest(series: Mapping[Any, Sequence[Any]]) -> list[float]:
    """The last values of the replicas' series. Empty series are omitted."""
    return [points[-1].value for points in series.values() if points]

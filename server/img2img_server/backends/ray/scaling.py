"""How many replicas there should be, by the seconds of work that they tell they have. Runs in Ray Serve's controller.

Serve itself keeps to the bounds and waits for the delays of its AutoscalingConfig; here is only how many are wanted now. Knows
nothing of Ray: Serve sends this module's code to its controller.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

QUEUED_SECONDS = "queued_seconds"
"""The name of the figure that replicas tell the controller (`record_autoscaling_stats`)."""
_SLACK = 0.5
"""Part of the target that the replicas which stay may be filled to: else the next request would bring one back."""


def wanted(queued: Sequence[float], current: int, target: float) -> int:
    """The number of replicas that `queued` seconds, one number for each that told, are to be shared by.

    More than the `current` number as soon as they have more than `target` seconds each; fewer only where those that stay would
    have at most half of it. At least one.
    """
    total = sum(queued)
    most, fewest = math.ceil(total / target), max(1, math.ceil(total / (target * _SLACK)))
    return most if most > current else min(current, fewest)


class QueuedSecondsPolicy:
    """Serve's policy: is asked with an AutoscalingContext about ten times a second."""

    def __init__(self, target: float) -> None:
        self._target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """How many replicas are wanted, and what to remember, which is nothing."""
        told = latest((context.raw_metrics or {}).get(QUEUED_SECONDS, {}))
        if not told:
            return context.target_num_replicas, {}
        return wanted(told, context.target_num_replicas, self._target), {}


def latest(series: Mapping[Any, Sequence[Any]]) -> list[float]:
    """The last value of each replica's series, without those that are empty."""
    return [points[-1].value for points in series.values() if points]

"""Checks of a run's guarantees, and the measurements behind them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from soak_parts.ledger import Ledger
from soak_parts.watching import Checkpoint, Watch, slope

WARM_UP = 0.2
"""The share of the run after which memory growth is checked."""
MOST_GROWTH = 0.02
MOST_SLOPE, LEAST_SLOPE_SECONDS = 0.01, 1800.0
"""Maximum relative growth of idle memory per hour, and the minimum seconds of load to check it."""
MOST_HEALTH, LEAST_HEALTH_CHECKS = 0.25, 400
"""Maximum 99th percentile of health checks in seconds, and the minimum number of checks."""
MOST_RATIO, LEAST_SMALL = 3.0, 100
"""Maximum ratio of the small tenant's 95th percentile under load to that alone, and the minimum number of requests."""
STOP_SLACK = 5.0
"""Seconds after --grace within which the process must end."""
LEAST_CHECKPOINTS = 6
"""Minimum number of checkpoints after warm-up to check memory."""
_DESCRIPTORS, _THREADS = 8, 4
"""Allowed excess over the maximum during warm-up: a connection that is closing, a thread of a pool."""
PROVOKED: tuple[tuple[str, str], ...] = ()
"""Patterns of error lines in the log that a soak is expected to cause, with the reason. None so far."""
_TROUBLE = re.compile(r"\b(ERROR|CRITICAL)\b|^Traceback|Segmentation fault|double free|Aborted", re.MULTILINE)
_LINES = 5


@dataclass(frozen=True, slots=True)
class Growth:
    """Resident memory when idle, in bytes: the medians of the first and of the last three checkpoints after warm-up.

    `per_hour` is the slope of the line through all of them, `load_per_hour` that through the samples under load. `share` is
    the growth from first to last; it is checked only if `judged`.
    """

    first: float
    last: float
    per_hour: float
    load_per_hour: float
    judged: bool

    @property
    def share(self) -> float:
        """The relative growth."""
        return self.last / self.first - 1 if self.first else 0.0

    @property
    def share_per_hour(self) -> float:
        """The slope relative to the first value."""
        return self.per_hour / self.first if self.first else 0.0


def growth_of(watch: Watch, seconds: float) -> Growth:
    """The growth of memory after the first fifth of a run of `seconds`."""
    after = [point for point in watch.checkpoints if point.at >= WARM_UP * seconds]
    resting = [(point.at, float(point.vitals.rss)) for point in after]
    loaded = [(at, float(rss)) for at, rss in watch.under_load if at >= WARM_UP * seconds]
    sizes = [rss for _, rss in resting] or [0.0]
    return Growth(
        first=median(sizes[:3]),
        last=median(sizes[-3:]),
        per_hour=slope(resting) * 3600,
        load_per_hour=slope(loaded) * 3600,
        judged=len(after) >= LEAST_CHECKPOINTS,
    )


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds: of the small tenant's requests alone and under load, and from SIGTERM to the server's end.

    `grace` is the server's setting.
    """

    alone: Sequence[float]
    under_load: Sequence[float]
    stop: float
    grace: float

    @property
    def ratio(self) -> float:
        """The small tenant's 95th percentile under load divided by that alone; 0 if either is unknown."""
        return percentile(self.under_load, 95) / percentile(self.alone, 95) if self.alone else 0.0


def percentile(seconds: Sequence[float], share: float) -> float:
    """The percentile; 0 without values."""
    return float(np.percentile(seconds, share)) if len(seconds) else 0.0


def judge_times(times: Times, health: Sequence[float]) -> list[str]:
    """The violated time limits. Percentiles are checked only with the samples of a run of several minutes."""
    broken = []
    p99 = percentile(health, 99)
    if len(health) >= LEAST_HEALTH_CHECKS and p99 > MOST_HEALTH:
        broken.append(f"the 99th percentile of health checks is {p99 * 1e3:.0f} ms; the limit is {MOST_HEALTH * 1e3:.0f} ms")
    if len(times.under_load) >= LEAST_SMALL and times.ratio > MOST_RATIO:
        broken.append(f"the small tenant's 95th percentile is {times.ratio:.1f} times that alone; the limit is {MOST_RATIO:g}")
    if times.stop > times.grace + STOP_SLACK:
        broken.append(f"the server ended {times.stop:.1f} s after SIGTERM; the limit is {times.grace + STOP_SLACK:g} s")
    return broken


def judge(ledger: Ledger, watch: Watch, growth: Growth, log: str, seconds: float) -> list[str]:
    """One line for each violated guarantee other than time limits."""
    broken = list(ledger.violations)
    if ledger.violation_count > len(ledger.violations):
        broken.append(f"... and {ledger.violation_count - len(ledger.violations)} further violations")
    if ledger.lost or ledger.in_flight:
        broken.append(f"{ledger.lost} operations never ended: {ledger.open_kinds()}")
    if not watch.health_seconds:
        broken.append("no health check was made")
    if growth.judged and growth.share > MOST_GROWTH:
        broken.append(f"memory grew by {growth.share:.1%}; the limit is {MOST_GROWTH:.0%}")
    if growth.judged and seconds >= LEAST_SLOPE_SECONDS and growth.share_per_hour > MOST_SLOPE:
        broken.append(f"idle memory grows by {growth.share_per_hour:.1%} per hour; the limit is {MOST_SLOPE:.0%}")
    warm = [point for point in watch.checkpoints if point.at <= WARM_UP * seconds] or watch.checkpoints[:1]
    broken += _more_than("descriptors", [point.vitals.descriptors for point in warm], watch.checkpoints, _DESCRIPTORS)
    broken += _more_than("threads", [point.vitals.threads for point in warm], watch.checkpoints, _THREADS)
    trouble = troubles(log)
    if trouble:
        broken.append(f"{len(trouble)} error lines in the server's log: " + " | ".join(trouble[:_LINES]))
    return broken


def _more_than(name: str, before: Sequence[int], checkpoints: Sequence[Checkpoint], slack: int) -> list[str]:
    if not checkpoints:
        return [f"no checkpoint counted the {name}"]
    last: int = getattr(checkpoints[-1].vitals, name)
    most = max(before) + slack
    return [f"{last} {name} at the end; the limit is {most}"] if last > most else []


def troubles(log: str) -> list[str]:
    """Error lines in a server's log that the soak did not cause."""
    return [
        line for line in log.splitlines() if _TROUBLE.search(line) and not any(re.search(known, line) for known, _ in PROVOKED)
    ]

"""Whether the run kept every promise, and the figures that say by how much."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from soak_parts.ledger import Ledger
from soak_parts.watching import Checkpoint, Watch, slope

WARM_UP = 0.2
"""The share of the run after which memory is held to its bound."""
MOST_GROWTH = 0.02
MOST_SLOPE, LEAST_SLOPE_SECONDS = 0.01, 1800.0
"""The rise of memory at rest in an hour, of what there was at first; and the seconds of load without which that says nothing."""
MOST_HEALTH, LEAST_HEALTH_CHECKS = 0.25, 400
"""Seconds for health's 99th percentile, and the checks without which that is only the longest few."""
MOST_RATIO, LEAST_SMALL = 3.0, 100
"""The small tenant's 95th percentile under load, of that alone; and the requests under load that it takes to say so."""
STOP_SLACK = 5.0
"""Seconds beyond --grace within which the process ends."""
LEAST_CHECKPOINTS = 6
"""After warm-up; with fewer, the run was too short to say anything of memory."""
_DESCRIPTORS, _THREADS = 8, 4
"""That may be there more than at any moment of rest during warm-up: a connection that is about to go, a pool's thread."""
PROVOKED: tuple[tuple[str, str], ...] = ()
"""Patterns of lines of the log's errors that a soak is expected to provoke, and why. None is, so far."""
_TROUBLE = re.compile(r"\b(ERROR|CRITICAL)\b|^Traceback|Segmentation fault|double free|Aborted", re.MULTILINE)
_LINES = 5


@dataclass(frozen=True, slots=True)
class Growth:
    """Resident memory at rest, in bytes: the median of the first and of the last three checkpoints after warm-up.

    `per_hour` is the slope of the line through all of them, `load_per_hour` that through the samples under load. `share` is
    the growth from first to last; it counts only where it is `judged`.
    """

    first: float
    last: float
    per_hour: float
    load_per_hour: float
    judged: bool

    @property
    def share(self) -> float:
        """The growth, of 1."""
        return self.last / self.first - 1 if self.first else 0.0

    @property
    def share_per_hour(self) -> float:
        """The slope, of what there was at first."""
        return self.per_hour / self.first if self.first else 0.0


def growth_of(watch: Watch, seconds: float) -> Growth:
    """How memory grew after the first fifth of a run of `seconds`."""
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

    `grace` is what the server was started with.
    """

    alone: Sequence[float]
    under_load: Sequence[float]
    stop: float
    grace: float

    @property
    def ratio(self) -> float:
        """The small tenant's 95th percentile under load, of that alone; 0 where either is not known."""
        return percentile(self.under_load, 95) / percentile(self.alone, 95) if self.alone else 0.0


def percentile(seconds: Sequence[float], share: float) -> float:
    """The percentile, 0 of nothing."""
    return float(np.percentile(seconds, share)) if len(seconds) else 0.0


def judge_times(times: Times, health: Sequence[float]) -> list[str]:
    """The bounds of time that were broken. Those of percentiles need as many samples as a run of a few minutes has."""
    broken = []
    p99 = percentile(health, 99)
    if len(health) >= LEAST_HEALTH_CHECKS and p99 > MOST_HEALTH:
        broken.append(f"health's 99th percentile is {p99 * 1e3:.0f} ms, the most is {MOST_HEALTH * 1e3:.0f}")
    if len(times.under_load) >= LEAST_SMALL and times.ratio > MOST_RATIO:
        broken.append(f"a small tenant's 95th percentile is {times.ratio:.1f} times what it is alone, the most is {MOST_RATIO:g}")
    if times.stop > times.grace + STOP_SLACK:
        broken.append(f"the server ended {times.stop:.1f} s after SIGTERM, the most is {times.grace + STOP_SLACK:g}")
    return broken


def judge(ledger: Ledger, watch: Watch, growth: Growth, log: str, seconds: float) -> list[str]:
    """Every promise that was broken but for those of time, in a line each; none for a good run."""
    broken = list(ledger.violations)
    if ledger.violation_count > len(ledger.violations):
        broken.append(f"... and {ledger.violation_count - len(ledger.violations)} more like these")
    if ledger.lost or ledger.in_flight:
        broken.append(f"{ledger.lost} operations never ended: {ledger.open_kinds()}")
    if not watch.health_seconds:
        broken.append("health was never asked")
    if growth.judged and growth.share > MOST_GROWTH:
        broken.append(f"memory grew by {growth.share:.1%}, the most is {MOST_GROWTH:.0%}")
    if growth.judged and seconds >= LEAST_SLOPE_SECONDS and growth.share_per_hour > MOST_SLOPE:
        broken.append(f"memory at rest rises by {growth.share_per_hour:.1%} an hour, the most is {MOST_SLOPE:.0%}")
    warm = [point for point in watch.checkpoints if point.at <= WARM_UP * seconds] or watch.checkpoints[:1]
    broken += _more_than("descriptors", [point.vitals.descriptors for point in warm], watch.checkpoints, _DESCRIPTORS)
    broken += _more_than("threads", [point.vitals.threads for point in warm], watch.checkpoints, _THREADS)
    trouble = troubles(log)
    if trouble:
        broken.append(f"{len(trouble)} lines of errors in the server's log: " + " | ".join(trouble[:_LINES]))
    return broken


def _more_than(name: str, before: Sequence[int], checkpoints: Sequence[Checkpoint], slack: int) -> list[str]:
    if not checkpoints:
        return [f"{name} were never counted"]
    last: int = getattr(checkpoints[-1].vitals, name)
    most = max(before) + slack
    return [f"{last} {name} are open at the end, at most {most} were expected"] if last > most else []


def troubles(log: str) -> list[str]:
    """The lines of a server's log that tell of an error nobody provoked."""
    return [
        line for line in log.splitlines() if _TROUBLE.search(line) and not any(re.search(known, line) for known, _ in PROVOKED)
    ]

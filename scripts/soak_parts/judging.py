"""Whether the run kept every promise, and the figures that say by how much."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from soak_parts.ledger import Ledger
from soak_parts.watching import Checkpoint, Watch, slope

WARM_UP = 0.2
"""The share of the run after which memory is held to its bound."""
MOST_GROWTH = 0.02
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


def judge(ledger: Ledger, watch: Watch, growth: Growth, log: str, seconds: float) -> list[str]:
    """Every promise that was broken, in a line each; none for a good run."""
    broken = list(ledger.violations)
    if ledger.violation_count > len(ledger.violations):
        broken.append(f"... and {ledger.violation_count - len(ledger.violations)} more like these")
    if ledger.lost or ledger.in_flight:
        broken.append(f"{ledger.lost} operations never ended: {ledger.open_kinds()}")
    if not watch.health_seconds:
        broken.append("health was never asked")
    if growth.judged and growth.share > MOST_GROWTH:
        broken.append(f"memory grew by {growth.share:.1%}, the most is {MOST_GROWTH:.0%}")
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

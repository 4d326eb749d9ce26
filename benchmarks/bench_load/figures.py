"""Numbers from records: throughput, percentiles, the short request among long ones, the estimate's error."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench_load.sending import Record

MEASURED = ("", "foreground")
"""The roles whose latency is the workload's."""


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` % of `values` do not exceed, between neighbours by their distance; NaN for no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True, slots=True)
class Run:
    """One list of jobs sent to one server."""

    server: str
    workload: str
    round: int
    records: tuple[Record, ...]

    @property
    def answered(self) -> list[Record]:
        """The measured records that are not errors."""
        return [record for record in self.records if record.role in MEASURED and not record.error]

    @property
    def span(self) -> float:
        """Seconds from the first job sent to the last answer."""
        counted = self.answered
        return max(each.sent + each.latency for each in counted) - min(each.sent for each in counted) if counted else math.nan


@dataclass(frozen=True, slots=True)
class Figures:
    """What one server did with one workload, all rounds together. Times in seconds; NaN where there is nothing to count."""

    requests: int
    errors: int
    requests_per_second: float
    steps_per_second: float
    per_round: tuple[float, ...]
    """Requests per second, round by round: how steady the machine was."""
    p50: float
    p95: float
    p99: float
    mean: float
    queue_p50: float
    alone_p50: float
    """Of the foreground's own requests while nothing else runs."""
    estimate_error: float
    """The median of |estimate / what it took - 1|."""


def summarize(runs: Sequence[Run]) -> Figures:
    """The figures of one server's rounds of one workload."""
    counted = [record for run in runs for record in run.answered]
    latencies = [record.latency for record in counted]
    span = sum(run.span for run in runs)
    alone = [record.latency for run in runs for record in run.records if record.role == "alone" and not record.error]
    estimates = [abs(record.estimate_error) for record in counted if record.estimate_error is not None]
    return Figures(
        requests=len(counted),
        errors=sum(record.role in MEASURED and bool(record.error) for run in runs for record in run.records),
        requests_per_second=len(counted) / span if counted else math.nan,
        steps_per_second=sum(record.steps for record in counted) / span if counted else math.nan,
        per_round=tuple(len(run.answered) / run.span for run in runs),
        p50=percentile(latencies, 50),
        p95=percentile(latencies, 95),
        p99=percentile(latencies, 99),
        mean=statistics.fmean(latencies) if latencies else math.nan,
        queue_p50=percentile([record.queue for record in counted if record.queue is not None], 50),
        alone_p50=percentile(alone, 50),
        estimate_error=percentile(estimates, 50),
    )

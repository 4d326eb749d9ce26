"""Figures from records: throughput, percentiles, errors of estimates."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench_load.sending import Record

MEASURED = ("", "foreground")
"""Roles whose latencies count for the workload."""


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile of `values`, with linear interpolation; NaN if there are none."""
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
    cpu: float = math.nan
    """Seconds of processor time that the server used meanwhile, in all its processes."""

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
    """The results of one server for one workload, over all rounds. Times in seconds; NaN without values."""

    requests: int
    errors: int
    requests_per_second: float
    steps_per_second: float
    cpu_per_request: float
    """Seconds of the server's processor time, which depend less on other load of the machine."""
    per_round: tuple[float, ...]
    """Requests per second of each round, to show how stable the machine was."""
    p50: float
    p95: float
    p99: float
    mean: float
    queue_p50: float
    alone_p50: float
    """Median latency of the foreground's requests while nothing else runs."""
    estimate_error: float
    """The median of |estimate / actual time - 1|."""


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
        cpu_per_request=sum(run.cpu for run in runs) / len(counted) if counted else math.nan,
        per_round=tuple(len(run.answered) / run.span for run in runs),
        p50=percentile(latencies, 50),
        p95=percentile(latencies, 95),
        p99=percentile(latencies, 99),
        mean=statistics.fmean(latencies) if latencies else math.nan,
        queue_p50=percentile([record.queue for record in counted if record.queue is not None], 50),
        alone_p50=percentile(alone, 50),
        estimate_error=percentile(estimates, 50),
    )

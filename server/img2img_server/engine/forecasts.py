"""The parts of forecasts of long queues: estimates of the device's time for many jobs from a few sums per group, sums over the
active requests, and corrections by the errors of earlier forecasts.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from img2img_server.engine.costs import Group
from img2img_server.engine.policy import Job, Policy
from img2img_server.engine.request import Ticket


@dataclass(slots=True)
class GroupSums:
    """Sums over the jobs of a group: their number, rows, rows in all steps, and seconds outside of steps. `like` is one of
    them."""

    like: Job
    jobs: int = 0
    rows: int = 0
    row_steps: float = 0
    apart: float = 0.0

    def add(self, job: Job, sign: int = 1) -> None:
        """Adds a job; removes it if `sign` is -1."""
        self.jobs += sign
        self.rows += sign * job.rows
        self.row_steps += sign * job.rows * job.steps_left
        self.apart += sign * (job.setup + job.ending)


def group_sums(jobs: Iterable[Job]) -> dict[Group, GroupSums]:
    """The sums of jobs by their group."""
    groups: dict[Group, GroupSums] = {}
    for job in jobs:
        sums = groups.get(job.group)
        if sums is None:
            sums = groups[job.group] = GroupSums(job)
        sums.add(job)
    return groups


class Backlog:
    """Jobs and their estimated seconds of work if jobs of a group share calls.

    `row_seconds` has the seconds of a step of one row like a job's, if there are so many rows to share calls. A group is
    estimated again when one of its jobs is added or removed.
    """

    def __init__(self, row_seconds: Callable[[Job, int], float]) -> None:
        self._row_seconds = row_seconds
        self._groups: dict[Group, GroupSums] = {}
        self._estimates: dict[Group, float] = {}
        self._seconds = 0.0

    def add(self, job: Job) -> None:
        """Adds a job."""
        sums = self._groups.get(job.group)
        if sums is None:
            sums = self._groups[job.group] = GroupSums(job)
        sums.like = job
        sums.add(job)
        self._estimate(job.group, sums)

    def remove(self, job: Job) -> None:
        """Removes a job that was added with the same values."""
        sums = self._groups[job.group]
        sums.add(job, -1)
        if sums.jobs:
            self._estimate(job.group, sums)
            return
        del self._groups[job.group]
        estimate = self._estimates.pop(job.group)
        self._seconds = self._seconds - estimate if self._groups else 0.0  # so that rounding errors do not accumulate

    def seconds(self, others: Mapping[Group, GroupSums]) -> float:
        """The seconds of work of all jobs and of `others`."""
        seconds = self._seconds
        for group, sums in others.items():
            mine = self._groups.get(group)
            if mine is None:
                seconds += self._together(sums.like, sums.rows, sums.row_steps, sums.apart)
            else:
                rows, row_steps, apart = mine.rows + sums.rows, mine.row_steps + sums.row_steps, mine.apart + sums.apart
                seconds += self._together(sums.like, rows, row_steps, apart) - self._estimates[group]
        return seconds

    def _estimate(self, group: Group, sums: GroupSums) -> None:
        estimate = self._together(sums.like, sums.rows, sums.row_steps, sums.apart)
        self._seconds += estimate - self._estimates.get(group, 0.0)
        self._estimates[group] = estimate

    def _together(self, like: Job, rows: int, row_steps: float, apart: float) -> float:
        return apart + row_steps * self._row_seconds(like, rows)


_LEAST_WEIGHT = 0.15
"""The minimum weight of the newest request in the running mean of forecast errors."""
_CAUTION = 4
"""Observations after which half of their mean error is applied as a correction."""


class ActiveSums:
    """The active requests at the start of call number `call`. `groups` and `seconds` are sums over all of them."""

    def __init__(self, policy: Policy, call: int) -> None:
        self.call, self.count = call, len(policy.order)
        self.groups = group_sums(policy.order)
        self._usage = dict(policy.usage)
        self._clients: dict[str, list[tuple[float, float]]] = {}  # of each request: the seconds left, and its end
        had = dict(policy.usage)  # an end is what the client has had of the device when the request is finished
        jobs = []
        for job in policy.order:
            left = job.seconds_left
            end = had.get(job.client, 0.0) + left
            jobs.append((end, left))
            if job.client:
                had[job.client] = end
                self._clients.setdefault(job.client, []).append((left, end))
        jobs.sort()
        self._ends = [end for end, _ in jobs]
        self._sums = list(accumulate((left for _, left in jobs), initial=0.0))
        self.seconds = self._sums[-1]

    def before(self, job: Job, own_seconds: float) -> float:
        """The seconds of those that are ahead of a waiting request, with `own_seconds` of its client's waiting ahead of it: those
        of its client that have less left, and those of others that are finished when their client has had less."""
        left, mine = job.seconds_left, self._clients.get(job.client, ())
        own = sum(other for other, _ in mine if other < left)
        end = self._usage.get(job.client, 0.0) + own + own_seconds + left
        return own + self._sums[bisect_left(self._ends, end)] - sum(other for other, other_end in mine if other_end < end)


class Corrections:
    """Mean errors of forecasts, by groups of similar requests."""

    def __init__(self) -> None:
        self._bias: dict[Hashable, tuple[float, int]] = {}

    def apply(self, ticket: Ticket, forecast: float, count: int) -> float:
        """The forecast, corrected by the mean error of similar forecasts, since other requests arrive. Forecasts are similar if
        their numbers of steps, and of other requests at their arrival (`count`), are similar."""
        if ticket.forecast_key is None:
            ticket.forecast_key = ticket.plan.step_count.bit_length(), count.bit_length()
        mean, observed = self._bias.get(ticket.forecast_key, (0.0, 0))
        return forecast * math.exp(mean * observed / (observed + _CAUTION))

    def learn(self, ticket: Ticket, seconds: float) -> None:
        """Records how long a request took."""
        if not ticket.forecast or seconds <= 0:
            return
        mean, count = self._bias.get(ticket.forecast_key, (0.0, 0))
        share = max(_LEAST_WEIGHT, 1 / (count + 1))
        self._bias[ticket.forecast_key] = (mean + share * (math.log(seconds / ticket.forecast) - mean), count + 1)

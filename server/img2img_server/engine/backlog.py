"""Estimates the device's time for many jobs from a few sums per group."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from img2img_server.engine.costs import Group
from img2img_server.engine.policy import Job


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

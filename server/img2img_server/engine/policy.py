"""Who shares the next call of the model: plain arithmetic on jobs, which the scheduler decides by and forecasts with."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from img2img_server.engine.costs import Costs, Group

_PRESSING = 4.0
"""A deadline presses when fewer than this many times the request's own remaining seconds are left."""
_PATIENCE = 8
"""Calls of the model that may pass over a request before it leads one; four times as many while a deadline presses."""
_URGENT = 4.0
"""At most so many times does a second's delay count for a request that has less left than another."""
_UNKNOWN = 1.0
"""Seconds of a call that nothing is known about yet: all are taken for equal."""


@dataclass(slots=True)
class Job:
    """A request as the policy sees it.

    `step_seconds` is a call of its rows alone; `setup` and `ending` are the seconds before its first step and after its
    last; `passed_over` counts the calls since it last took part in one.
    """

    number: int
    group: Group
    pixels: int
    rows: int
    steps_left: int
    deadline: float | None
    step_seconds: float
    setup: float
    ending: float
    passed_over: int = 0
    background: bool = False

    @property
    def seconds_left(self) -> float:
        """What it would still take, alone on the device."""
        return self.setup + self.steps_left * self.step_seconds + self.ending

    def rank(self, now: float) -> tuple[bool, float, float, int]:
        """Sorts jobs: pressing deadlines first, the earliest before the others; then those with the least left to do.

        Those with as much left go by deadline, then by arrival. Those in the background come last.
        """
        if self.background:
            return True, math.inf, math.inf, self.number
        left, deadline = self.seconds_left, math.inf if self.deadline is None else self.deadline
        if deadline - now < _PRESSING * left:
            return False, deadline, left, self.number
        return True, left, deadline, self.number


class Policy:
    """Chooses the jobs of each call.

    1. The leader. A job that too many calls passed over leads every second one, so that none waits for ever. Else a job
       whose deadline presses, the earliest first. Else the one with the least left to do: a short request that comes
       while long ones run is done in about its own time, and the long ones lose no more than that.
    2. Who joins it: jobs of its group, in the same order, as many as pay best. A shared call saves everybody the seconds that
       apart it would take longer, and costs those inside that have less left than one who joins. Where a call of many rows
       takes as long as one of few, all join. Where time grows with the rows, those who have about as much left share calls,
       and a short one is not held up by long ones.

    `max_batch_size` bounds the rows of a call; what was measured may bound them further.
    """

    def __init__(self, costs: Costs, max_batch_size: int) -> None:
        self._costs = costs
        self._max_batch_size = max_batch_size
        self._led_by_patience = False

    def next_batch(self, jobs: Sequence[Job], others: int, max_rows: dict[str, int | None], now: float) -> list[Job]:
        """The jobs of the next call. `others` is how many wait and cannot take part."""
        order = sorted(jobs, key=lambda job: job.rank(now))
        patience = _PATIENCE if order[0].rank(now)[0] else 4 * _PATIENCE
        late = [] if self._led_by_patience else [job for job in jobs if job.passed_over >= patience]
        self._led_by_patience = bool(late)
        leader = max(late, key=lambda job: (job.passed_over, -job.number)) if late else None
        return self._choose(order, leader, others, max_rows)

    def forecast(self, jobs: Iterable[Job], max_rows: dict[str, int | None], now: float) -> dict[int, float]:
        """When each job would be finished, by its number, if no other came: the policy run ahead.

        Whole stretches are run at once: until somebody of the call is finished, nobody's place changes much.
        """
        left, finished = [replace(job) for job in jobs], {}
        while left:
            left.sort(key=lambda job: job.rank(now))
            batch = self._choose(left, None, 0, max_rows)
            steps = min(job.steps_left for job in batch)
            now += steps * self.seconds(batch) + sum(job.setup for job in batch)
            for job in batch:
                job.steps_left -= steps
                job.setup = 0.0
                if job.steps_left <= 0:
                    now += job.ending
                    finished[job.number] = now
            left = [job for job in left if job.number not in finished]
        return finished

    def seconds(self, batch: Sequence[Job]) -> float:
        """The expected seconds of a call."""
        return self._call_seconds(batch[0], sum(job.rows for job in batch))

    def _choose(self, order: Sequence[Job], leader: Job | None, others: int, max_rows: dict[str, int | None]) -> list[Job]:
        leader = leader or order[0]
        limit = max_rows[leader.group[0]] or self._max_batch_size
        cap = self._costs.cap(leader.group, leader.pixels, min(limit, self._max_batch_size))
        batch, rows, takes = [leader], leader.rows, leader.step_seconds
        apart, lost, best, size = takes, 0.0, 0.0, 1
        for job in order:
            if job is leader or job.group != leader.group or rows + job.rows > cap:
                continue
            before, takes = takes, self._call_seconds(leader, rows + job.rows)
            lost += max(0.0, takes - before) * _losers(batch, job)
            apart += job.step_seconds
            rows += job.rows
            batch.append(job)
            gain = (apart - takes) * (len(order) + others) - lost
            if gain > best:
                best, size = gain, len(batch)
        return batch[:size]

    def _call_seconds(self, like: Job, rows: int) -> float:
        known = self._costs.seconds("denoise", like.group, like.pixels, rows)
        return _UNKNOWN if known is None else known


def _losers(batch: Sequence[Job], joining: Job) -> float:
    """How many of the call are held up by another who joins it; one with far less left counts for several."""
    left = joining.seconds_left
    return sum(min(_URGENT, max(0.0, left / max(job.seconds_left, 1e-9) - 1.0)) for job in batch)

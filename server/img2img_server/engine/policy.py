"""Which requests share the next call of the model, and fair queueing between clients: plain arithmetic on jobs.

The scheduler decides and forecasts with it. Fair queueing: a client that sends many requests delays another client's request by
no more than the time that this request itself takes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from img2img_server.engine.costs import Costs, Group

_URGENCY = 4.0
"""A deadline is urgent when fewer than this many times the request's own remaining seconds are left."""


JobSeconds = tuple[float, float, float]
"""The expected seconds of a step, of what comes before the first step and of what comes after the last."""


@dataclass(slots=True)
class Job:
    """The policy's view of a request.

    `step_seconds` is the duration of a call with only its rows; `setup` and `ending` are the seconds before its first step and
    after its last; `passed_over` counts the calls since it last took part in one. `client` is "" if it has no client. If its
    steps differ, `group`, `pixels`, `rows` and `step_seconds` are of the next one, and `steps_left` is the remaining time in
    units of that step.
    """

    number: int
    group: Group
    pixels: int
    rows: int
    steps_left: float
    deadline: float | None
    step_seconds: float
    setup: float
    ending: float
    passed_over: int = 0
    background: bool = False
    client: str = ""
    images: int = 1
    work: float = 1.0
    """How many times longer a step takes than one of as many plain rows, which the costs are of (see Plan)."""
    steps_done: float = 0.0
    """Steps that are done, counted in steps like its next one."""

    @property
    def seconds(self) -> JobSeconds:
        """The seconds of a step, of what comes before the first and of what comes after the last."""
        return self.step_seconds, self.setup, self.ending

    @seconds.setter
    def seconds(self, seconds: JobSeconds) -> None:
        self.step_seconds, self.setup, self.ending = seconds

    @property
    def seconds_left(self) -> float:
        """The seconds it still takes if it runs alone."""
        return self.setup + self.steps_left * self.step_seconds + self.ending

    @property
    def length(self) -> float:
        """The seconds of the whole request if it runs alone, without what came before its first step once that is done."""
        return self.seconds_left + self.steps_done * self.step_seconds

    @property
    def urgent_at(self) -> float:
        """The time at which its deadline becomes urgent, if no step is done before."""
        return math.inf if self.deadline is None else self.deadline - _URGENCY * self.seconds_left

    def rank(self, now: float, before: float = 0.0) -> tuple[bool, float, float, int]:
        """Sorts jobs: urgent deadlines first, the earliest before the others; then those with the least left to do.

        Ties are broken by deadline, then by arrival. Background jobs come last. `before` is its client's usage plus the work of
        its client's jobs ahead of it, in seconds: it counts as the job's own. If it exceeds the job's own, no deadline is urgent.
        """
        if self.background:
            return True, math.inf, math.inf, self.number
        left, deadline = self.seconds_left, math.inf if self.deadline is None else self.deadline
        if before <= left and deadline - now < _URGENCY * left:
            return False, deadline, left, self.number
        return True, before + left, deadline, self.number


Usage = Mapping[str, float]
"""Seconds of device time by client, relative to the client that has used least since it arrived."""


def in_order(jobs: Iterable[Job], usage: Usage, now: float) -> list[Job]:
    """Sorts jobs by rank. If there are several clients, each job counts the usage of its client and its client's jobs ahead of it
    as its own."""
    ranked = sorted([(job.rank(now), job) for job in jobs])  # no two ranks are equal
    if _several([job for _, job in ranked]):
        before = dict(usage)
        for index, (_, job) in enumerate(ranked):
            if mine := before.get(job.client):
                ranked[index] = job.rank(now, mine), job
            if job.client:
                before[job.client] = (mine or 0.0) + job.seconds_left
        ranked.sort()
    return [job for _, job in ranked]


def charge(usage: Usage, jobs: Sequence[Job], batch: Sequence[Job], seconds: float) -> Usage:
    """Returns `usage` after `batch`, chosen from `jobs`, used the device for `seconds`.

    Clients without jobs are removed, so unused device time is not saved for later. A new client starts with the lowest usage. A
    client that was alone has at most the duration of its longest request more than a new one.
    """
    clients = {job.client for job in jobs if job.client}
    if not clients:
        return {}
    had = {client: usage.get(client, 0.0) for client in clients}
    load = _load(batch)
    for job in batch:
        if job.client:
            had[job.client] += seconds * job.rows * job.work / load
    if not _several(jobs):
        longest = max(job.seconds_left for job in jobs)
        return {client: min(share, longest) for client, share in had.items()}
    least = min(had.values())
    return {client: share - least for client, share in had.items()}


def _load(batch: Sequence[Job]) -> float:
    """The rows of a call, each counted by its work."""
    return sum(job.rows * job.work for job in batch)


def _several(jobs: Sequence[Job]) -> bool:
    return any(job.client != jobs[0].client for job in jobs)


_PATIENCE = 8
"""Calls that may pass over a request before it leads one; four times as many while a deadline is urgent."""
_MOST_WEIGHT = 4.0
"""The maximum weight of a delay for a request that is shorter than the joining one."""
_MOST_STRETCHED = 1.5
"""The factor by which jobs of clients with more usage than the leader's may lengthen its call."""
_UNKNOWN = 1.0
"""Assumed seconds of a call whose cost is unknown."""


class Policy:
    """Chooses the jobs of each call.

    1. The leader. Jobs with urgent deadlines come first, the earliest first. Otherwise the job with the least work left leads
       (shortest remaining time first): a short request that arrives while long ones run takes about its own time, and delays
       them by no more. If too many calls passed over a job of the leader's client, that job leads every second call of its
       client, so none starves. It never leads instead of another client's job: between clients, fair queueing prevents
       starvation.
    2. The members: jobs of its group, in the same order, as many as gain most. A shared call saves all requests the extra time
       of separate calls, but delays members that are shorter than a joining job. If the duration of a call does not depend on
       its rows, all join. If it grows with the rows, jobs of about the same length share calls, so that long ones do not delay
       short ones. Clients with more usage than the leader's request takes lengthen its calls by at most half.

    If there are several clients, a job's rank includes its client's usage and its client's requests ahead of it. `max_batch_size`
    limits the rows of a call; measured costs may limit them further.
    """

    def __init__(self, costs: Costs, max_batch_size: int) -> None:
        self._costs = costs
        self._max_batch_size = max_batch_size
        self._led_by_patience: set[str] = set()  # clients whose last call was led by a job that was passed over too often
        self.usage: Usage = {}
        self.order: list[Job] = []
        """The jobs that the last call was chosen from, by priority."""

    def in_order(self, jobs: Iterable[Job], now: float) -> list[Job]:
        """Sorts jobs by priority, ignoring how often they were passed over."""
        return in_order(jobs, self.usage, now)

    def next_batch(self, jobs: Sequence[Job], others: int, max_rows: dict[str, int | None], now: float) -> list[Job]:
        """The jobs of the next call. `others` is the number of waiting requests, which cannot join."""
        self.order = order = self.in_order(jobs, now)
        patience = _PATIENCE if order[0].rank(now)[0] else 4 * _PATIENCE
        client = order[0].client
        late = [job for job in jobs if job.passed_over >= patience and (job.background or job.client == client)]
        if client in self._led_by_patience:
            late = []
        self._led_by_patience &= {job.client for job in jobs} - {client}
        if late:
            self._led_by_patience.add(client)
        leader = max(late, key=lambda job: (job.passed_over, -job.number)) if late else None
        batch = self._choose(order, leader, others, max_rows, self.usage)
        self.usage = charge(self.usage, jobs, batch, self.seconds(batch))
        return batch

    def forecast(self, jobs: Iterable[Job], max_rows: dict[str, int | None], now: float) -> Iterator[tuple[int, float]]:
        """Simulates the policy: yields each job's number and its end time if no other request arrives, in order of these times.

        All steps until a member of the call is finished are simulated together, because the order changes little meanwhile.
        """
        left, usage = [replace(job) for job in jobs], self.usage
        while left:
            left = in_order(left, usage, now)
            batch = self._choose(left, None, 0, max_rows, usage)
            steps = min(job.steps_left for job in batch)
            seconds = steps * self.seconds(batch) + sum(job.setup for job in batch)
            usage = charge(usage, left, batch, seconds)
            now += seconds
            for job in batch:
                job.steps_left, job.steps_done = job.steps_left - steps, job.steps_done + steps
                job.setup = 0.0
                if job.steps_left <= 0:
                    now += job.ending
                    yield job.number, now
            left = [job for job in left if job.steps_left > 0]

    def work(self, jobs: Iterable[Job], max_rows: dict[str, int | None], most: int) -> float:
        """Estimates the device seconds of all jobs, assuming that jobs of a group share calls of at most `most` members. Faster
        than a forecast: linear in the number of jobs."""
        groups: dict[Group, list[Job]] = {}
        for job in jobs:
            groups.setdefault(job.group, []).append(job)
        return sum(self._group_work(group, max_rows, most) for group in groups.values())

    def _group_work(self, jobs: list[Job], max_rows: dict[str, int | None], most: int) -> float:
        jobs.sort(key=lambda job: job.steps_left)
        widest = max(job.rows for job in jobs)
        cap = max(widest, min(self.most_rows(jobs[0], max_rows), most * widest))
        rows, load, steps, seconds = sum(job.rows for job in jobs), _load(jobs), 0.0, 0.0
        for job in jobs:
            if job.steps_left > steps:
                shared = min(rows, cap)
                seconds += (job.steps_left - steps) * self._call_seconds(job, shared) * load / shared
                steps = job.steps_left
            rows -= job.rows
            load -= job.rows * job.work
            seconds += job.setup + job.ending
        return seconds

    def row_seconds(self, like: Job, rows: int, max_rows: dict[str, int | None], most: int) -> float:
        """The seconds of a step of one row like those of a job, if `rows` rows share calls as far as that pays, at most `most`
        requests each."""
        shared = min(rows, max(like.rows, min(self.most_rows(like, max_rows), most * like.rows)))
        return self._call_seconds(like, shared) / shared

    def next_seconds(self, jobs: Iterable[Job], max_rows: dict[str, int | None], now: float) -> float:
        """The expected seconds of the next call, ignoring how often jobs were passed over."""
        return self.seconds(self._choose(self.in_order(jobs, now), None, 0, max_rows, self.usage))

    def seconds(self, batch: Sequence[Job]) -> float:
        """The expected seconds of a call."""
        rows = sum(job.rows for job in batch)
        return self._call_seconds(batch[0], rows) * _load(batch) / rows

    def _choose(
        self, order: Sequence[Job], leader: Job | None, others: int, max_rows: dict[str, int | None], usage: Usage
    ) -> list[Job]:
        leader = leader or order[0]
        lengths = [leader.length]
        fair = usage.get(leader.client, 0.0) + leader.seconds_left
        limit, cap = self._limit(leader, max_rows), self.most_rows(leader, max_rows)
        batch, rows, takes, widest = [leader], leader.rows, leader.step_seconds, leader.rows
        load = leader.rows * leader.work
        apart, lost, best, size = takes, 0.0, 0.0, 1
        for job in order:
            if job is leader or job.group != leader.group:
                continue
            if rows >= max(cap, limit):
                break
            together = rows + job.rows
            if together > cap:  # unless padding rows are computed anyway
                padded = self._costs.padded(leader.group[0], max(widest, job.rows))
                if together > min(padded, limit):
                    continue
            widest = max(widest, job.rows)
            heavier = load + job.rows * job.work
            before, takes = takes, self._call_seconds(leader, together) * heavier / together
            if takes > _MOST_STRETCHED * leader.step_seconds and usage.get(job.client, 0.0) > fair:
                takes = before
                continue
            length = job.length
            if takes > before:
                lost += (takes - before) * _delayed(lengths, length)
            apart += job.step_seconds
            rows, load = together, heavier
            batch.append(job)
            lengths.append(length)
            gain = (apart - takes) * (len(order) + others) - lost
            if gain > best:
                best, size = gain, len(batch)
        return batch[:size]

    def most_rows(self, like: Job, max_rows: dict[str, int | None]) -> int:
        """The largest number of rows of a call of jobs like this one that pays."""
        return self._costs.cap(like.group, like.pixels, self._limit(like, max_rows))

    def _limit(self, like: Job, max_rows: dict[str, int | None]) -> int:
        return min(max_rows[like.group[0]] or self._max_batch_size, self._max_batch_size)

    def _call_seconds(self, like: Job, rows: int) -> float:
        known = self._costs.seconds("denoise", like.group, like.pixels, rows)
        return _UNKNOWN if known is None else known


def _delayed(lengths: Sequence[float], length: float) -> float:
    """How many members of the call, which take `lengths` seconds alone, are delayed by one that joins and takes `length`.

    A far shorter one counts several times. It does not matter how much of each is done: a few milliseconds more are little to a
    long request that is nearly done."""
    return sum(min(_MOST_WEIGHT, length / max(shorter, 1e-9) - 1.0) for shorter in lengths if shorter < length)

"""Turns among clients: a client that sends much holds up another by no more than what the other's own request takes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from img2img_server.engine.costs import Group

_PRESSING = 4.0
"""A deadline presses when fewer than this many times the request's own remaining seconds are left."""


@dataclass(slots=True)
class Job:
    """A request as the policy sees it.

    `step_seconds` is a call of its rows alone; `setup` and `ending` are the seconds before its first step and after its
    last; `passed_over` counts the calls since it last took part in one. `client` tells whose it is, "" where it stands for
    itself.
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
    client: str = ""

    @property
    def seconds_left(self) -> float:
        """What it would still take, alone on the device."""
        return self.setup + self.steps_left * self.step_seconds + self.ending

    def rank(self, now: float, before: float = 0.0) -> tuple[bool, float, float, int]:
        """Sorts jobs: pressing deadlines first, the earliest before the others; then those with the least left to do.

        Those with as much left go by deadline, then by arrival. Those in the background come last. `before` are seconds of its
        client's that come before it: they count as its own, and where they are more than that, no deadline of its presses.
        """
        if self.background:
            return True, math.inf, math.inf, self.number
        left, deadline = self.seconds_left, math.inf if self.deadline is None else self.deadline
        if before <= left and deadline - now < _PRESSING * left:
            return False, deadline, left, self.number
        return True, before + left, deadline, self.number


Shares = Mapping[str, float]
"""Seconds of the device by client: what each had more than the one of them that had least, since that one came."""


def in_order(jobs: Iterable[Job], shares: Shares, now: float) -> list[Job]:
    """Who comes before whom: by rank, where the jobs of each client stand in a line, behind each other and behind what their
    client had. Where there is one client only, that is the order by rank alone."""
    ranked = sorted(jobs, key=lambda job: job.rank(now))
    if not _several(ranked):
        return ranked
    before = dict(shares)
    lines = []
    for job in ranked:
        mine = before.get(job.client, 0.0)
        lines.append((job.rank(now, mine), job))
        if job.client:
            before[job.client] = mine + job.seconds_left
    return [job for _, job in sorted(lines, key=lambda line: line[0])]


def charged(shares: Shares, jobs: Sequence[Job], batch: Sequence[Job], seconds: float) -> Shares:
    """`shares` after `batch`, of all `jobs` that might have been in it, had the device for `seconds`.

    Who has no job is forgotten: nobody saves up for later. Who comes anew begins as the one that had least; a client that had
    the device to itself is ahead of it by what it had, but by no more than its longest request takes.
    """
    clients = {job.client for job in jobs if job.client}
    if not clients:
        return {}
    had = {client: shares.get(client, 0.0) for client in clients}
    rows = sum(job.rows for job in batch)
    for job in batch:
        if job.client:
            had[job.client] += seconds * job.rows / rows
    if not _several(jobs):
        longest = max(job.seconds_left for job in jobs)
        return {client: min(share, longest) for client, share in had.items()}
    least = min(had.values())
    return {client: share - least for client, share in had.items()}


def _several(jobs: Sequence[Job]) -> bool:
    return any(job.client != jobs[0].client for job in jobs)

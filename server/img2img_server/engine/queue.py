"""The waiting requests, in the order of their admission. No operation visits all of them.

The requests of a client are its line, sorted by rank (policy.py). Admitted first are those of clients without an active request,
so a client waits for one slot at most, however many requests others have queued; then those of the other clients; background
requests come last. Among clients the order is by rank, with what is ahead of a request in its client's line counted as its own.
Requests without a client have no line: each is on its own.

Requests of one kind, alike in model, shape, rows, images and work, are sorted by the same seconds of a step, so equal ones stay
in the order of their arrival. These change when they are off by a fifth; requests that wait are sorted in again one by one.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice, takewhile

from img2img_server.engine.costs import Group
from img2img_server.engine.forecasts import Backlog, GroupSums
from img2img_server.engine.policy import Job, JobSeconds
from img2img_server.engine.ranked import NO_LINE, Line, LineSums, Rank, RankedList
from img2img_server.engine.request import Ticket

_CHANGED = 0.2
"""The relative change of a request's seconds after which requests of its kind are sorted by the new value."""


@dataclass(slots=True, eq=False)
class Entry:
    """A waiting request. `rank` is its rank in its client's line. `alarm` is the time at which its deadline becomes urgent,
    after that the deadline itself; None without a deadline. `forecast_at` is the time at which its position was last computed."""

    ticket: Ticket
    job: Job
    forecast_at: float
    rank: Rank = (True, 0.0, 0.0, 0)
    seconds: float = 0.0
    alarm: float | None = None


_Requests = RankedList[Entry]
_Kind = tuple[Group, int, int, float]
"""Model and shape, rows, images, work."""


class Queue:
    """The waiting requests of all clients, whose jobs are in `backlog` too. `activate` and `deactivate` track the clients with
    active requests."""

    def __init__(self, backlog: Backlog) -> None:
        self._backlog = backlog
        self._entries: OrderedDict[int, Entry] = OrderedDict()  # the least recently computed position comes first
        self._lines: dict[str, _Requests] = {}
        self._active: Counter[str] = Counter()  # active requests of each client
        # The first requests of clients without an active request, and requests without a client.
        self._first: _Requests = RankedList()
        self._unserved, self._served = LineSums(), LineSums()  # lines of clients without and with an active request
        self._background: _Requests = RankedList()
        self._alarms: _Requests = RankedList()
        # The seconds that each kind is sorted by, and its number of waiting requests.
        self._kinds: dict[_Kind, tuple[JobSeconds, int]] = {}
        self._seconds = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def seconds(self) -> float:
        """The sum of the seconds of all waiting requests if each runs alone."""
        return self._seconds

    def work(self, others: Mapping[Group, GroupSums]) -> float:
        """The estimated seconds of work of all waiting requests and of `others`."""
        return self._backlog.seconds(others)

    def add(self, ticket: Ticket, job: Job, now: float) -> None:
        """Adds a request."""
        kind = self._price(job)
        self._kinds[kind] = job.seconds, self._kinds.get(kind, (job.seconds, 0))[1] + 1
        entry = self._entries[ticket.number] = Entry(ticket, job, now)
        self._insert(entry, now)

    def remove(self, ticket: Ticket) -> Job:
        """Removes a request."""
        entry = self._entries.pop(ticket.number)
        self._withdraw(entry)
        kind = _kind_of(entry.job)
        seconds, count = self._kinds.pop(kind)
        if count > 1:
            self._kinds[kind] = seconds, count - 1
        if not self._entries:
            self._seconds = 0.0  # so that rounding errors do not accumulate
        return entry.job

    def update(self, ticket: Ticket, job: Job, now: float) -> None:
        """Records that the position of `ticket` was computed, and moves it if its seconds have changed."""
        entry = self._entries[ticket.number]
        entry.forecast_at = now
        self._entries.move_to_end(ticket.number)
        kind = self._price(job)
        if job.seconds_left != entry.seconds:
            self._kinds[kind] = job.seconds, self._kinds[kind][1]
            self._withdraw(entry)
            entry.job = job
            self._insert(entry, now)

    def activate(self, client: str) -> None:
        """Records that a request of `client` became active."""
        if self._active[client]:
            self._active[client] += 1
        elif client:
            self._hide(client)
            self._active[client] = 1
            self._show(client)

    def deactivate(self, client: str) -> None:
        """Records that a request of `client` is no longer active."""
        if self._active[client] > 1:
            self._active[client] -= 1
        elif client:
            self._hide(client)
            del self._active[client]
            self._show(client)

    def forecast_before(self, time: float, most: int) -> list[Ticket]:
        """Up to `most` requests whose position was not computed since `time`, the least recent first."""
        entries = islice(self._entries.values(), most)
        return [entry.ticket for entry in takewhile(lambda entry: entry.forecast_at <= time, entries)]

    def first_of(self, client: str, most: int) -> list[Ticket]:
        """The first requests of a client's line, up to `most`."""
        return [entry.ticket for entry in islice(self._lines.get(client, ()), most)]

    def expired(self, now: float) -> list[Ticket]:
        """The requests whose deadline has passed. Moves requests whose deadline becomes urgent."""
        due = list(takewhile(lambda entry: entry.alarm is not None and entry.alarm <= now, self._alarms))
        for entry in due:
            if not _has_passed(entry, now):
                self._withdraw(entry)
                self._insert(entry, now)
        return [entry.ticket for entry in due if _has_passed(entry, now)]

    def in_order(self, now: float, ahead: Callable[[Job], float]) -> Iterator[Ticket]:
        """The requests in the order of their admission. `ahead` has the seconds that count as ahead of a job because its client
        has active requests. Nothing may be added or removed meanwhile."""
        yield from self._merged(self._first.ranks, now, lambda job: 0.0)
        served = (next(iter(self._lines[client])) for client in self._active if client in self._lines)
        yield from self._merged(sorted((entry.job.rank(now, ahead(entry.job)), entry) for entry in served), now, ahead)
        yield from (entry.ticket for entry in self._background)

    def ahead_of(self, job: Job, now: float) -> tuple[int, float, float]:
        """About how many requests are admitted before `job` and the sum of their seconds, and the sum of those of its client.

        Exact for the first requests of lines and for what is ahead in the same line. Of other lines as much counts as is done if
        all clients that have active requests, or all that have none, get the same share of the device from now on.
        """
        self._price(job)
        foreground = len(self._entries) - len(self._background)
        rank = job.rank(now)
        if job.background:
            behind, seconds = self._background.before(rank)
            return foreground + behind, self.seconds - self._background.seconds + seconds, 0.0
        requests = self._lines.get(job.client)
        own, own_seconds = requests.before(rank) if requests else (0, 0.0)
        rank = job.rank(now, own_seconds)
        end = own_seconds + job.seconds_left if rank[0] else 0.0
        line = self._line(job.client, requests) if requests else NO_LINE
        if job.client in self._active:
            count, seconds = len(self._first), self._first.seconds
            served, served_seconds = self._served.done(end, line)
            others, others_seconds = self._unserved.done(end, NO_LINE)
            others, others_seconds = others + served, others_seconds + served_seconds
        else:
            count, seconds = self._first.before(rank)
            others, others_seconds = self._unserved.done(end, line)
            if own:  # the first counts twice
                count, seconds = count - 1, seconds - line.first
        count, seconds = count + own + round(others), seconds + own_seconds + others_seconds
        return min(count, foreground), min(seconds, self.seconds), own_seconds

    def _price(self, job: Job) -> _Kind:
        """Sets a job's seconds to those that its kind is sorted by, unless they have changed much. Returns its kind."""
        kind = _kind_of(job)
        seconds, left = job.seconds, job.seconds_left
        job.seconds = self._kinds.get(kind, (seconds, 0))[0]
        if abs(left - job.seconds_left) > _CHANGED * job.seconds_left:
            job.seconds = seconds
        return kind

    def _merged(self, first: Iterable[tuple[Rank, Entry]], now: float, ahead: Callable[[Job], float]) -> Iterator[Ticket]:
        """Merges the lines that begin with `first`, which is sorted."""
        following: list[tuple[Rank, Entry, Iterator[Entry], float]] = []

        def follow(entry: Entry, line: Iterator[Entry], seconds: float) -> None:
            """Adds the next request of a line to the comparison with other lines."""
            after, seconds = next(line, None), seconds + entry.seconds
            if after is not None:
                heappush(following, (after.job.rank(now, ahead(after.job) + seconds), after, line, seconds))

        for rank, entry in first:
            while following and following[0][0] < rank:
                _, behind, line, seconds = heappop(following)
                yield behind.ticket
                follow(behind, line, seconds)
            yield entry.ticket
            follow(entry, islice(self._lines.get(entry.job.client, ()), 1, None), 0.0)
        while following:
            _, behind, line, seconds = heappop(following)
            yield behind.ticket
            follow(behind, line, seconds)

    def _insert(self, entry: Entry, now: float) -> None:
        job, entry.rank, entry.seconds = entry.job, entry.job.rank(now), entry.job.seconds_left
        self._backlog.add(job)
        self._seconds += entry.seconds
        if job.deadline is not None and not job.background:
            begins = math.nextafter(now, math.inf)
            entry.alarm = max(job.urgent_at, begins) if entry.rank[0] else job.deadline
        else:
            entry.alarm = job.deadline
        if entry.alarm is not None:
            self._alarms.add(_alarm_rank(entry), 0.0, entry)
        if job.background:
            self._background.add(entry.rank, entry.seconds, entry)
        elif not job.client:
            self._first.add(entry.rank, entry.seconds, entry)
        else:
            self._hide(job.client)
            self._lines.setdefault(job.client, RankedList()).add(entry.rank, entry.seconds, entry)
            self._show(job.client)

    def _withdraw(self, entry: Entry) -> None:
        self._backlog.remove(entry.job)
        self._seconds -= entry.seconds
        if entry.alarm is not None:
            self._alarms.remove(_alarm_rank(entry))
        client = entry.job.client
        if entry.job.background:
            self._background.remove(entry.rank)
        elif not client:
            self._first.remove(entry.rank)
        else:
            self._hide(client)
            self._lines[client].remove(entry.rank)
            if not self._lines[client]:
                del self._lines[client]
            self._show(client)

    def _hide(self, client: str) -> None:
        """Before the line of `client` changes: removes it from the sums and what is sorted."""
        if requests := self._lines.get(client):
            line = self._line(client, requests)
            (self._unserved if line.skip else self._served).remove(line)
            if line.skip:
                self._first.remove(next(iter(requests)).rank)

    def _show(self, client: str) -> None:
        """After the line of `client` has changed: adds it again."""
        if requests := self._lines.get(client):
            line = self._line(client, requests)
            (self._unserved if line.skip else self._served).add(line)
            if line.skip:
                first = next(iter(requests))
                self._first.add(first.rank, first.seconds, first)

    def _line(self, client: str, requests: _Requests) -> Line:
        """The sums of a line. The first request of a client without an active one is in `_first`."""
        return Line(next(iter(requests)).seconds, requests.seconds, len(requests), 0 if client in self._active else 1)


def _kind_of(job: Job) -> _Kind:
    return job.group, job.rows, job.images, job.work


def _has_passed(entry: Entry, now: float) -> bool:
    return entry.job.deadline is not None and entry.job.deadline <= now


def _alarm_rank(entry: Entry) -> Rank:
    assert entry.alarm is not None, "it has a deadline"
    return True, entry.alarm, 0.0, entry.job.number

"""Tracks all requests: decides which leave, which are admitted, and which share the next call. Makes no model calls.

The time per step, per new request and per leaving request does not depend on the number of waiting requests.
"""

import itertools
import math
from collections import Counter, deque
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass

from img2img_server.engine.costs import Costs
from img2img_server.engine.forecasts import ActiveSums, Backlog, Corrections, group_sums
from img2img_server.engine.policy import Job, JobSeconds, Policy
from img2img_server.engine.queue import Queue
from img2img_server.engine.request import Plan, RequestStatus, StepCall, Ticket
from img2img_server.errors import DeadlineExpired, DeadlineUnmeetable, RequestCancelled, ServerError
from img2img_server.settings.setting import setting

_MOST_FORECAST = 48
"""Maximum requests for which a forecast simulates the policy. This takes quadratic time, and for more requests it is no more
accurate than the summed work of the requests ahead."""
_FORECAST_INTERVAL = 1.0
"""Seconds between two forecasts of a request."""
_LEAST_UPDATED, _MOST_UPDATED = 4, 32
"""The minimum and maximum of waiting requests that are forecast between two steps, in turn, if more than `_MOST_FORECAST` wait or
are active."""
_SECONDS_PER_UPDATE = 0.005
"""Seconds since the previous step for each forecast request, within this minimum and maximum."""
_SUMMED_CALLS = 8
"""Calls after which the sums over active requests, used for estimates, are computed again, and requests that could join a call
are searched again if there were none."""
_MOST_COMPARED = 32
"""Waiting requests that are searched for ones with the first one's shape, to be admitted with it."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Limits of the engine.

    `max_batch_size` is the maximum rows of one call of the model, where an image with classifier-free guidance takes two;
    measured costs may keep batches smaller. At most `max_active` requests are in progress, `max_waiting` wait, and `max_admitted`
    are encoded between two steps of the others. `max_waiting_seconds` limits the estimated unfinished work in seconds, None for
    no limit; `max_client_waiting` limits the unfinished requests of one client. An eighth of `max_waiting` is reserved for
    clients without a request, so no client can lock others out of the queue.
    """

    max_batch_size: int = setting(16, "maximum rows of one model call; an image with guidance takes two", metavar="N", least=1)
    max_active: int = setting(32, "maximum number of requests in progress", metavar="N", least=1)
    max_waiting: int = setting(256, "maximum number of waiting requests", metavar="N", least=1)
    max_admitted: int = setting(
        4, "maximum number of requests that are encoded between two steps of the others", metavar="N", least=1
    )
    max_waiting_seconds: float | None = setting(
        None,
        "refuse requests while the estimated accepted work exceeds this (default: no limit)",
        metavar="SECONDS",
        least=0,
    )
    max_client_waiting: int = setting(128, "maximum number of waiting and running requests of one client", metavar="N", least=1)

    def waiting_slots(self, held: int, engines: int = 1) -> int:
        """The maximum requests that may wait in all `engines` for a new request of a client that has `held` requests."""
        slots = self.max_waiting * engines
        return slots - slots // 8 if held else slots


class Scheduler:
    """The unfinished requests of all models, by status. The policy decides which are admitted first and which share a call."""

    def __init__(self, limits: QueueLimits, costs: Costs, max_rows: dict[str, int | None]) -> None:
        self.limits = limits
        self._tickets: dict[RequestStatus, dict[int, Ticket]] = {status: {} for status in RequestStatus}
        self._costs = costs
        self._max_rows = max_rows
        self._policy = Policy(costs, limits.max_batch_size)
        self._queue = Queue(Backlog(lambda job, rows: self._policy.row_seconds(job, rows, max_rows, limits.max_active)))
        self._models: Counter[str] = Counter()  # requests that have not ended
        self._clients: Counter[str] = Counter()  # waiting and active requests for which no slot counts
        self._corrections = Corrections()
        self._unknown: set[str] = set()  # models of requests that came before their costs were known
        self._forecast_at = self._updated_at = -math.inf
        self._jobs: dict[int, Job] = {}  # of active requests
        self._kinds: Counter[Hashable] = Counter()  # active requests of each kind
        self._calls = 0
        self._none_joined: tuple[int, int, int] | None = None  # when no waiting request could join a call
        self._in_progress = ActiveSums(self._policy, 0)
        self.cancelled: deque[Ticket] = deque()
        """Where tickets note that they were cancelled."""

    @property
    def tickets(self) -> list[Ticket]:
        """All requests that have not ended."""
        return [ticket for tickets in self._tickets.values() for ticket in tickets.values()]

    @property
    def waiting(self) -> Collection[Ticket]:
        """Requests that were not admitted yet, in the order of their arrival."""
        return self._tickets[RequestStatus.WAITING].values()

    @property
    def active(self) -> Collection[Ticket]:
        """Requests that were admitted and take part in calls, in the order of their admission."""
        return self._tickets[RequestStatus.ACTIVE].values()

    @property
    def idle(self) -> bool:
        """Whether no request waits or is active. Some may still be leaving."""
        return not self.waiting and not self.active

    @property
    def empty(self) -> bool:
        """Whether all requests have ended."""
        return not self._models

    def has(self, model: str) -> bool:
        """Whether a request of `model` has not ended."""
        return self._models[model] > 0

    def add(self, ticket: Ticket, now: float) -> None:
        """Queues a request that is accepted. Sets its position and, if costs are known, when it is expected to be finished.

        Raises DeadlineUnmeetable if it is forecast to end after its deadline, although deadlines have priority.
        """
        job, known = self._job(ticket), self._costs.knows(ticket.request.model)
        position, forecast = None, None
        if len(self.active) + len(self.waiting) >= _MOST_FORECAST:
            position, forecast = self._estimate(job, now, self._pace())
        elif known:
            jobs = (*self._active_jobs(), *map(self._job, self.waiting), job)
            ends = self._policy.forecast(jobs, self._max_rows, now)
            forecast = next(end for number, end in ends if number == job.number) - now
        if not known:
            self._unknown.add(ticket.request.model)
        ticket.forecast = forecast if known else None
        _check_deadline(ticket)
        self._expect(ticket, now, ticket.forecast)
        self._tickets[RequestStatus.WAITING][ticket.number] = ticket
        self._models[ticket.request.model] += 1
        self._count(ticket, 1)
        self._queue.add(ticket, job, now)
        ticket.position = self._position(ticket, now) if position is None else position

    def leave(self, ticket: Ticket) -> bool:
        """Takes a request out of the queue or out of the next calls. False if it is leaving already or has ended."""
        if ticket.status not in (RequestStatus.WAITING, RequestStatus.ACTIVE):
            return False
        self._count(ticket, -1)
        self._move(ticket, RequestStatus.LEAVING)
        return True

    def remove(self, ticket: Ticket) -> bool:
        """Removes a request that is about to end. False if another thread has removed it: that one delivers its ending."""
        if self._tickets[RequestStatus.LEAVING].pop(ticket.number, None) is None:
            return False
        self._models[ticket.request.model] -= 1
        if not self._models[ticket.request.model]:
            del self._models[ticket.request.model]
        return True

    def remove_all(self) -> list[Ticket]:
        """Removes all requests and returns them, so that their endings can be delivered."""
        tickets = self.tickets
        for ticket in tickets:
            self.leave(ticket)
            self.remove(ticket)
        return tickets

    def set_max_rows(self, model: str, rows: int | None) -> None:
        """Sets the maximum rows of one call of `model`, None for no limit."""
        self._max_rows[model] = rows

    def drop(self, now: float) -> list[tuple[Ticket, ServerError]]:
        """Takes out requests that were cancelled or whose deadline has passed. Returns them with the reason."""
        cancelled = [self.cancelled.popleft() for _ in range(len(self.cancelled))]
        late = [ticket for ticket in self.active if ticket.request.deadline is not None and ticket.request.deadline <= now]
        tickets = (*cancelled, *late, *self._queue.expired(now))
        return [(ticket, error) for ticket in tickets if (error := _ending_error(ticket, now)) and self.leave(ticket)]

    def admit(self, now: float) -> list[Ticket]:
        """Admits the first waiting request that could join a call and a few that share its shape, so the active ones wait for one
        encoding at most: of one request with image prompts, since each of its images can take as long as many steps. If none is
        active, as many of one kind as fill a call are admitted, so that they end together."""
        free = self.limits.max_active - len(self.active)
        if free <= 0 or not self.waiting:
            return []
        newest = next(reversed(self._tickets[RequestStatus.WAITING]))
        seen = newest, len(self.active), self._calls // _SUMMED_CALLS
        if seen == self._none_joined:
            return []
        joining = self._joining(now)
        if (first := next(joining, None)) is None:
            self._none_joined = seen
            return []
        few, most = min(free, self.limits.max_admitted), 0 if self.active else self._most_rows(first)
        chosen, rows = [first], first.plan.rows
        for ticket in joining:
            if len(chosen) >= (free if most else few):
                break
            if self.active and ticket.request.image_prompts and any(other.request.image_prompts for other in chosen):
                continue
            fills = ticket.kind == first.kind and rows + ticket.plan.rows <= most
            if fills or (len(chosen) < few and ticket.group == first.group):
                chosen.append(ticket)
                rows += ticket.plan.rows
        for ticket in chosen:
            self._move(ticket, RequestStatus.ACTIVE)
        return chosen

    def _joining(self, now: float) -> Iterator[Ticket]:
        """The first waiting requests, in the order of their admission, except requests whose call is filled by active ones of
        their kind with priority. These stay in the queue, so that they are encoded together when the active ones end, not earlier
        and one by one."""
        held: dict[Hashable, bool] = {}
        for ticket in itertools.islice(self._in_order(now), _MOST_COMPARED):
            if ticket.kind not in held:  # later ones of that kind have less priority
                held[ticket.kind] = self._is_held(ticket, now)
            if not held[ticket.kind]:
                yield ticket

    def _is_held(self, ticket: Ticket, now: float) -> bool:
        """Whether active requests like a waiting one, and with priority over it, fill a call."""
        alike, rows = self._kinds[ticket.kind], ticket.plan.rows
        if not alike or (alike + 1) * rows <= (most := self._most_rows(ticket)):
            return False
        active = self._tickets[RequestStatus.ACTIVE]
        for job in self._policy.in_order((*self._jobs.values(), self._job(ticket)), now):
            if job.number == ticket.number or alike == 0:
                break
            alike -= active[job.number].kind == ticket.kind
        return (self._kinds[ticket.kind] - alike + 1) * rows > most

    def _most_rows(self, ticket: Ticket) -> int:
        """The rows of the largest call that pays for requests like a waiting one."""
        return self._policy.most_rows(self._job(ticket), self._max_rows)

    def next_batch(self, now: float) -> list[Ticket]:
        """The requests of the next call."""
        active = self.active
        self._calls += 1
        if not active:
            self._policy.order = []
            return []
        batch = self._policy.next_batch(self._active_jobs(), len(self.waiting), self._max_rows, now)
        for ticket in active:
            ticket.passed_over += 1
        chosen = [self._tickets[RequestStatus.ACTIVE][job.number] for job in batch]
        for ticket in chosen:
            ticket.passed_over = 0
        return chosen

    def count(self, client: str) -> int:
        """How many waiting and active requests `client` has, without background requests and those for which a slot counts."""
        return self._clients[client]

    def set_slotted(self, ticket: Ticket, slotted: bool) -> None:
        """Sets whether a slot counts for a request."""
        live = ticket.status in (RequestStatus.WAITING, RequestStatus.ACTIVE)
        if live:
            self._count(ticket, -1)
        ticket.slotted = slotted
        if live:
            self._count(ticket, 1)

    def next_end(self, client: str, now: float) -> float | None:
        """Seconds until the first request of `client` is expected to be finished, None if unknown."""
        active = [ticket for ticket in self.active if ticket.request.client == client]
        tickets = (*active, *self._queue.first_of(client, _MOST_COMPARED))
        return min((ticket.expected - now for ticket in tickets if ticket.expected is not None), default=None)

    def work(self) -> float | None:
        """The estimated seconds of work of all requests, None if the costs of some are unknown."""
        if not all(map(self._costs.knows, self._models)):
            return None
        if self._few:
            jobs = (*self._active_jobs(), *map(self._job, self.waiting))
            return self._policy.work(jobs, self._max_rows, self.limits.max_active)
        return self._queue.work(group_sums(self._active_jobs()))

    def seconds_to_admission(self, now: float) -> float | None:
        """Seconds until the next waiting request is expected to be admitted: after the next step if one can be, else when the
        first active one ends. None if costs are unknown."""
        jobs = self._active_jobs()
        if not jobs or not all(self._costs.knows(job.group[0]) for job in jobs):
            return None
        if len(jobs) < self.limits.max_active and (not self.waiting or next(self._joining(now), None) is not None):
            return self._policy.next_seconds(jobs, self._max_rows, now)
        return next(end for _, end in self._policy.forecast(jobs, self._max_rows, now)) - now

    def update_forecasts(self, now: float) -> list[Ticket]:
        """Updates the expected ends of requests, each about once a second. Returns waiting ones whose position has changed."""
        since, self._updated_at = now - self._updated_at, now
        due = now - self._forecast_at >= _FORECAST_INTERVAL
        if due:
            self._forecast_at = now
        if any(map(self._costs.knows, self._unknown)):
            self._price_again(now)
        if self._few:
            return self._forecast_all(now) if due else []
        if due:
            self._forecast_active(now)
        return self._forecast_some(now, int(min(_MOST_UPDATED, max(_LEAST_UPDATED, since / _SECONDS_PER_UPDATE))))

    def learn(self, ticket: Ticket, seconds: float) -> None:
        """Records how long a request took, to correct later forecasts."""
        self._corrections.learn(ticket, seconds)

    @property
    def _few(self) -> bool:
        """Whether so few requests wait or are active that the policy is simulated."""
        return len(self.active) + len(self.waiting) <= _MOST_FORECAST

    def _forecast_all(self, now: float) -> list[Ticket]:
        waiting = [(ticket, self._job(ticket)) for ticket in self.waiting]
        tickets = {ticket.number: ticket for ticket in (*self.active, *self.waiting)}
        jobs = (*self._active_jobs(), *(job for _, job in waiting))
        for number, end in self._policy.forecast(jobs, self._max_rows, now):
            self._expect(tickets[number], now, end - now)
        for ticket, job in waiting:
            self._queue.update(ticket, job, now)
        return [ticket for position, ticket in enumerate(self._in_order(now)) if _moved(ticket, position)]

    def _price_again(self, now: float) -> None:
        """Sorts again all waiting requests whose costs were unknown on their arrival and are known now. Once for each model."""
        known = {model for model in self._unknown if self._costs.knows(model)}
        self._unknown -= known
        for ticket in self.waiting:
            if ticket.request.model in known:
                self._queue.update(ticket, self._job(ticket), now)

    def _forecast_active(self, now: float) -> None:
        pace, active, seconds = self._pace(), self._tickets[RequestStatus.ACTIVE], 0.0
        for job in self._policy.order:
            seconds += job.seconds_left
            if job.number in active:
                self._expect(active[job.number], now, pace * seconds)

    def _forecast_some(self, now: float, most: int) -> list[Ticket]:
        moved, pace = [], self._pace()
        for ticket in self._queue.forecast_before(now - _FORECAST_INTERVAL, most):
            job = self._job(ticket)
            self._queue.update(ticket, job, now)
            position, seconds = self._estimate(job, now, pace)
            self._expect(ticket, now, seconds)
            if _moved(ticket, position):
                moved.append(ticket)
        return moved

    def _expect(self, ticket: Ticket, now: float, forecast: float | None) -> None:
        """Sets the expected end of a request, unless its costs were unknown on its arrival."""
        if ticket.forecast is not None and forecast is not None:
            ticket.expected = now + self._corrections.apply(ticket, forecast, sum(map(len, self._tickets.values())))

    def _position(self, ticket: Ticket, now: float) -> int:
        return next(position for position, waiting in enumerate(self._in_order(now)) if waiting is ticket)

    def _in_order(self, now: float) -> Iterator[Ticket]:
        """The waiting requests in the order of their admission."""
        clients: dict[str, list[Job]] = {}
        for job in self._active_jobs():
            clients.setdefault(job.client, []).append(job)

        def ahead(job: Job) -> float:
            rank = job.rank(now)
            before = (other.seconds_left for other in clients.get(job.client, ()) if other.rank(now) < rank)
            return self._policy.usage.get(job.client, 0.0) + sum(before)

        return self._queue.in_order(now, ahead)

    def _estimate(self, job: Job, now: float, pace: float) -> tuple[int, float]:
        """About how many waiting requests are admitted before `job`, and in how many seconds it would be finished, without
        simulating the policy: at the `pace` of all requests."""
        count, seconds, own_seconds = self._queue.ahead_of(job, now)
        return count, pace * (seconds + self._active_sums().before(job, own_seconds) + job.seconds_left)

    def _pace(self) -> float:
        """The seconds of work of all requests by what they would take one after the other."""
        active = self._active_sums()
        return self._queue.work(active.groups) / ((self._queue.seconds + active.seconds) or 1.0)

    def _active_sums(self) -> ActiveSums:
        """Sums of the active requests, computed once in a few calls."""
        sums = self._in_progress
        if self._calls >= sums.call + _SUMMED_CALLS or abs(len(self._policy.order) - sums.count) > self.limits.max_admitted:
            sums = self._in_progress = ActiveSums(self._policy, self._calls)
        return sums

    def _count(self, ticket: Ticket, change: int) -> None:
        request = ticket.request
        if request.client and not request.background and not ticket.slotted:
            self._clients[request.client] += change
            if not self._clients[request.client]:
                del self._clients[request.client]

    def _move(self, ticket: Ticket, status: RequestStatus) -> None:
        del self._tickets[ticket.status][ticket.number]
        if ticket.status is RequestStatus.WAITING:
            job = self._queue.remove(ticket)
            if status is RequestStatus.ACTIVE:
                self._jobs[ticket.number] = job
                self._kinds[ticket.kind] += 1
                self._queue.activate(ticket.request.client)
        elif ticket.status is RequestStatus.ACTIVE:
            del self._jobs[ticket.number]
            self._kinds[ticket.kind] -= 1
            if not self._kinds[ticket.kind]:
                del self._kinds[ticket.kind]
            self._queue.deactivate(ticket.request.client)
        ticket.status = status
        self._tickets[status][ticket.number] = ticket

    def _active_jobs(self) -> list[Job]:
        """The jobs of the active requests, as they are now."""
        known: dict[Hashable, JobSeconds] = {}
        tickets = self._tickets[RequestStatus.ACTIVE]
        jobs = [self._jobs[number] for number in tickets]
        for ticket, job in zip(tickets.values(), jobs, strict=True):
            state = ticket.state
            if ticket.plan.calls:
                call = ticket.next_call
                job.group, job.pixels, job.rows = (ticket.request.model, call.shape), call.pixels, call.rows
            job.steps_left, job.steps_done = ticket.steps_left, ticket.step
            job.passed_over = ticket.passed_over
            kind = job.group, job.rows, job.images, job.work, state is None
            if (seconds := known.get(kind)) is None:
                seconds = known[kind] = self._seconds(ticket)
            job.step_seconds, job.setup, job.ending = seconds
            if ticket.plan.calls:
                job.steps_left = self._alike_steps(ticket, job.step_seconds)
        return jobs

    def _job(self, ticket: Ticket) -> Job:
        """The job of a request that is not active."""
        step, setup, ending = self._seconds(ticket)
        call = ticket.next_call
        return Job(
            number=ticket.number,
            group=(ticket.request.model, call.shape),
            pixels=call.pixels,
            rows=call.rows,
            steps_left=self._alike_steps(ticket, step) if ticket.plan.calls else ticket.steps_left,
            deadline=ticket.request.deadline,
            step_seconds=step,
            setup=setup,
            ending=ending,
            background=ticket.request.background,
            client=ticket.request.client,
            images=len(ticket.request.seeds),
            work=ticket.plan.work,
        )

    def _seconds(self, ticket: Ticket) -> JobSeconds:
        """The expected seconds of a step of a request alone, of what comes before its first step and after its last."""
        group, pixels, seconds = ticket.group, ticket.plan.pixels, self._costs.seconds
        step = self._step_seconds(ticket, ticket.next_call)
        setup = seconds("prepare", group, pixels, 1) if ticket.state is None else None
        ending = seconds("finish", group, pixels, len(ticket.request.seeds))
        return 1.0 if step is None else step, setup or 0.0, ending or 0.0

    def _step_seconds(self, ticket: Ticket, call: Plan | StepCall) -> float | None:
        """The expected seconds of a step of a request alone."""
        known = self._costs.seconds("denoise", (ticket.request.model, call.shape), call.pixels, call.rows)
        return None if known is None else known * ticket.plan.work

    def _alike_steps(self, ticket: Ticket, next_seconds: float) -> float:
        """The remaining time of a request whose steps differ, in units of its next step, which takes `next_seconds`."""
        left, seconds = Counter(ticket.plan.calls[ticket.step :]), 0.0
        for call, count in left.items():
            each = self._step_seconds(ticket, call)
            seconds += count * (next_seconds if each is None else each)
        return seconds / next_seconds if next_seconds else float(left.total())


def _ending_error(ticket: Ticket, now: float) -> ServerError | None:
    if ticket.cancelled:
        return RequestCancelled("the request was cancelled")
    deadline = ticket.request.deadline
    if deadline is not None and deadline <= now:
        return DeadlineExpired("the deadline passed before the request was finished")
    return None


def _moved(ticket: Ticket, position: int) -> bool:
    """Sets a ticket's position. Returns whether it had another."""
    before, ticket.position = ticket.position, position
    return position != before


def _check_deadline(ticket: Ticket) -> None:
    deadline, forecast = ticket.request.deadline, ticket.forecast
    if deadline is not None and forecast is not None and ticket.arrival + forecast > deadline:
        left = max(0.0, deadline - ticket.arrival)
        message = f"the request would take about {forecast:.2f} s, but its deadline is in {left:.2f} s"
        raise DeadlineUnmeetable(message, estimate=forecast)

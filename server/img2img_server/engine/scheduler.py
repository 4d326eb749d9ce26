"""Keeps all requests: which have to leave, which are admitted, which share the next call. Computes nothing itself."""

import itertools
import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

from img2img_server.engine.costs import Costs
from img2img_server.engine.policy import Job, Policy
from img2img_server.engine.request import RequestStatus, Ticket
from img2img_server.errors import DeadlineExpired, DeadlineUnmeetable, RequestCancelled, ServerError
from img2img_server.settings.setting import setting

_MOST_FORECAST = 48
"""Up to this many requests the policy is simulated for a forecast. That takes quadratic time, and beyond it is no more accurate
than the summed work of the requests ahead."""
_LEAST_WEIGHT = 0.15
"""The least weight of the newest request in the running mean of forecast errors."""
_CAUTION = 4
"""Observations after which half of their mean error is applied as a correction."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of the engine.

    `max_batch_size` is the rows of one call of the model, where an image with classifier-free guidance is two; what is
    measured at warm-up may keep batches smaller. `max_active` requests are in progress and `max_waiting` wait;
    `max_admitted` may be encoded between two steps of the others. `max_waiting_seconds` bounds the estimated seconds of work that
    is accepted and not done, None for no bound; `max_client_waiting` the requests of one client that have not ended.
    An eighth of `max_waiting` is reserved for clients that have no request yet, so no client can lock others out of the queue.
    """

    max_batch_size: int = setting(16, "maximum rows of one model call; an image with guidance takes two", metavar="N", least=1)
    max_active: int = setting(32, "maximum number of requests in progress", metavar="N", least=1)
    max_waiting: int = setting(256, "maximum number of waiting requests", metavar="N", least=1)
    max_admitted: int = setting(
        4, "maximum number of requests that are encoded between two steps of the others", metavar="N", least=1
    )
    max_waiting_seconds: float | None = setting(
        None,
        "refuse requests while the estimated accepted work exceeds this (default: no bound)",
        metavar="SECONDS",
        least=0,
    )
    max_client_waiting: int = setting(128, "maximum number of waiting and running requests of one client", metavar="N", least=1)

    def waiting_slots(self, held: int, engines: int = 1) -> int:
        """How many requests may wait, of all clients and in all `engines`, when a client that has `held` requests sends one."""
        slots = self.max_waiting * engines
        return slots - slots // 8 if held else slots


class Scheduler:
    """The requests of all models that have not ended, each with its status. The policy decides which are admitted first and which
    share a call."""

    def __init__(self, limits: QueueLimits, costs: Costs, max_rows: dict[str, int | None]) -> None:
        self.limits = limits
        self._tickets: dict[RequestStatus, dict[int, Ticket]] = {status: {} for status in RequestStatus}
        self._costs = costs
        self._max_rows = max_rows
        self._policy = Policy(costs, limits.max_batch_size)
        self._bias: dict[Hashable, tuple[float, int]] = {}

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

    def has(self, model: str) -> bool:
        """Whether a request of `model` has not ended."""
        return any(ticket.request.model == model for ticket in self.tickets)

    def add(self, ticket: Ticket) -> None:
        """Queues an accepted request."""
        self._tickets[ticket.status][ticket.number] = ticket

    def leave(self, ticket: Ticket) -> bool:
        """Takes a request out of the queue or out of the next calls. False if it is leaving already or has ended."""
        if ticket.status not in (RequestStatus.WAITING, RequestStatus.ACTIVE):
            return False
        self._move(ticket, RequestStatus.LEAVING)
        return True

    def remove(self, ticket: Ticket) -> bool:
        """Removes a request that is about to end. False if another thread has removed it: that one delivers its ending."""
        return self._tickets[RequestStatus.LEAVING].pop(ticket.number, None) is not None

    def remove_all(self) -> list[Ticket]:
        """Removes all requests and returns them, so that their endings can be delivered."""
        tickets = self.tickets
        for ticket in tickets:
            self.leave(ticket)
        self._tickets[RequestStatus.LEAVING].clear()
        return tickets

    def set_max_rows(self, model: str, rows: int | None) -> None:
        """Sets the most rows that one call of `model` takes, None for no limit."""
        self._max_rows[model] = rows

    def drop(self, now: float) -> list[tuple[Ticket, ServerError]]:
        """Has every request leave that was cancelled or whose deadline has passed. Returns them with the reason."""
        return [(ticket, error) for ticket in self.tickets if (error := _gone(ticket, now)) and self.leave(ticket)]

    def admit(self, now: float) -> list[Ticket]:
        """Admits a few waiting requests that share a shape, so the active ones wait for one encoding at most."""
        free = min(self.limits.max_admitted, self.limits.max_active - len(self.active))
        if free <= 0 or not self.waiting:
            return []
        order = [ticket for ticket, _ in self.positions(now)]
        chosen = [ticket for ticket in order if ticket.group == order[0].group][:free]
        for ticket in chosen:
            self._move(ticket, RequestStatus.ACTIVE)
        return chosen

    def next_batch(self, now: float) -> list[Ticket]:
        """The requests of the next call."""
        active = self.active
        if not active:
            return []
        batch = self._policy.next_batch(list(map(self._job, active)), len(self.waiting), self._max_rows, now)
        for ticket in active:
            ticket.passed_over += 1
        chosen = [self._tickets[RequestStatus.ACTIVE][job.number] for job in batch]
        for ticket in chosen:
            ticket.passed_over = 0
        return chosen

    def positions(self, now: float) -> list[tuple[Ticket, int]]:
        """Every waiting request and its position: how many come before it."""
        order = self._policy.in_order(map(self._job, (*self.active, *self.waiting)), now)
        return [(ticket, position) for position, ticket in enumerate(self._in_order_of_admission(order, self.waiting))]

    def forecast(self, ticket: Ticket, now: float) -> tuple[int, float | None]:
        """The position of `ticket`, which was not added yet, and the seconds until it would be finished if no other request came,
        None if costs are unknown."""
        tickets = (*self.active, *self.waiting, ticket)
        jobs = list(map(self._job, tickets))
        order = self._policy.in_order(jobs, now)
        position = self._in_order_of_admission(order, (*self.waiting, ticket)).index(ticket)
        if self._costs.seconds("denoise", ticket.group, ticket.plan.pixels, ticket.plan.rows) is None:
            return position, None
        if len(jobs) > _MOST_FORECAST:
            return position, self._work([*itertools.takewhile(lambda job: job is not jobs[-1], order), jobs[-1]])
        ends = self._policy.forecast(jobs, self._max_rows, now)
        return position, next(end for number, end in ends if number == ticket.number) - now

    def count(self, client: str) -> int:
        """How many requests `client` has, background requests excluded."""
        requests = (ticket.request for ticket in (*self.active, *self.waiting))
        return sum(request.client == client and not request.background for request in requests)

    def next_end(self, client: str, now: float) -> float | None:
        """Seconds until the first request of `client` is expected to be finished, None if unknown."""
        tickets = [ticket for ticket in (*self.active, *self.waiting) if ticket.request.client == client]
        return min((ticket.expected - now for ticket in tickets if ticket.expected is not None), default=None)

    def work(self) -> float | None:
        """The estimated seconds of work of all requests, None if the costs of some are unknown."""
        tickets = (*self.active, *self.waiting)
        return self._work(list(map(self._job, tickets))) if self._known(tickets) else None

    def seconds_to_admission(self, now: float) -> float | None:
        """Seconds until the first waiting request is expected to be admitted: after the next step if fewer than `max_active` are
        active, else when the first active one ends. None if costs are unknown."""
        active = self.active
        jobs = list(map(self._job, active))
        if not jobs or not self._known(active):
            return None
        if len(jobs) < self.limits.max_active:
            return self._policy.next_seconds(jobs, self._max_rows, now)
        return next(end for _, end in self._policy.forecast(jobs, self._max_rows, now)) - now

    def check_deadline(self, ticket: Ticket) -> None:
        """Raises DeadlineUnmeetable if the request is forecast to end after its deadline, although deadlines have priority."""
        deadline, forecast = ticket.request.deadline, ticket.forecast
        if deadline is not None and forecast is not None and ticket.arrival + forecast > deadline:
            left = max(0.0, deadline - ticket.arrival)
            raise DeadlineUnmeetable(f"it would take about {forecast:.2f} s, and {left:.2f} s are left", estimate=forecast)

    def update_forecasts(self, now: float) -> None:
        """Updates when each request is expected to be finished."""
        tickets = (*self.active, *self.waiting)
        jobs = list(map(self._job, tickets))
        if len(jobs) <= _MOST_FORECAST:
            ends = dict(self._policy.forecast(jobs, self._max_rows, now))
        else:
            order = self._policy.in_order(jobs, now)
            apart = list(itertools.accumulate(job.seconds_left for job in order))
            pace = self._work(jobs) / (apart[-1] or 1.0)
            ends = {job.number: now + pace * seconds for job, seconds in zip(order, apart, strict=True)}
        for ticket in tickets:
            if ticket.forecast is not None:
                ticket.expected = now + self.estimate(ticket, ends[ticket.number] - now)

    def estimate(self, ticket: Ticket, forecast: float) -> float:
        """The forecast, corrected by the mean error of similar forecasts, since other requests arrive."""
        mean, count = self._bias.get(self._forecast_key(ticket), (0.0, 0))
        return forecast * math.exp(mean * count / (count + _CAUTION))

    def learn(self, ticket: Ticket, seconds: float) -> None:
        """Records how long a request took, to correct later forecasts."""
        if not ticket.forecast or seconds <= 0:
            return
        mean, count = self._bias.get(ticket.forecast_key, (0.0, 0))
        share = max(_LEAST_WEIGHT, 1 / (count + 1))
        self._bias[ticket.forecast_key] = (mean + share * (math.log(seconds / ticket.forecast) - mean), count + 1)

    def _forecast_key(self, ticket: Ticket) -> Hashable:
        """Requests of about as many steps, among about as many others, have similar forecast errors."""
        if ticket.forecast_key is None:
            ticket.forecast_key = ticket.plan.step_count.bit_length(), sum(map(len, self._tickets.values())).bit_length()
        return ticket.forecast_key

    def _in_order_of_admission(self, order: Sequence[Job], waiting: Collection[Ticket]) -> list[Ticket]:
        """`waiting` in the order of admission. Clients without an active request come first, so they wait for one slot at most,
        however many requests others have queued."""
        tickets = {ticket.number: ticket for ticket in waiting}
        served = {ticket.request.client for ticket in self.active} - {""}
        line = [tickets[job.number] for job in order if job.number in tickets]
        return sorted(line, key=lambda ticket: (ticket.request.background, ticket.request.client in served))

    def _known(self, tickets: Collection[Ticket]) -> bool:
        """Whether the costs of all are known."""
        groups = {ticket.group: ticket.plan for ticket in tickets}
        return all(self._costs.seconds("denoise", group, plan.pixels, plan.rows) is not None for group, plan in groups.items())

    def _work(self, jobs: Sequence[Job]) -> float:
        return self._policy.work(jobs, self._max_rows, self.limits.max_active)

    def _move(self, ticket: Ticket, status: RequestStatus) -> None:
        del self._tickets[ticket.status][ticket.number]
        ticket.status = status
        self._tickets[status][ticket.number] = ticket

    def _job(self, ticket: Ticket) -> Job:
        plan, group, pixels, seconds = ticket.plan, ticket.group, ticket.plan.pixels, self._costs.seconds
        step = seconds("denoise", group, pixels, plan.rows)
        setup = seconds("prepare", group, pixels, 1) if ticket.state is None else None
        return Job(
            number=ticket.number,
            group=group,
            pixels=pixels,
            rows=plan.rows,
            steps_left=ticket.steps_left,
            deadline=ticket.request.deadline,
            step_seconds=1.0 if step is None else step,
            setup=setup or 0.0,
            ending=seconds("finish", group, pixels, len(ticket.request.seeds)) or 0.0,
            passed_over=ticket.passed_over,
            background=ticket.request.background,
            client=ticket.request.client,
        )


def _gone(ticket: Ticket, now: float) -> ServerError | None:
    if ticket.cancelled:
        return RequestCancelled("the request was cancelled")
    deadline = ticket.request.deadline
    if deadline is not None and deadline <= now:
        return DeadlineExpired("the deadline passed before the request was finished")
    return None

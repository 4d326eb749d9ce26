"""Keeps the waiting and the active requests: who has to leave, who is admitted, who shares the next call. Computes nothing."""

import math
from collections.abc import Hashable
from dataclasses import dataclass

from img2img_server.engine.costs import Costs, Stage
from img2img_server.engine.policy import Job, Policy
from img2img_server.engine.request import Ticket
from img2img_server.errors import DeadlineExpired, DeadlineUnmeetable, RequestCancelled, ServerError
from img2img_server.settings import setting

_MOST_FORECAST = 96
"""Requests up to which the policy is run ahead for a forecast. Beyond, it would take longer than the answer is good for."""
_LEAST_WEIGHT = 0.15
"""Of the newest request in the running mean of what forecasts were wrong by."""
_CAUTION = 4
"""So many cases it takes until half of their mean is believed."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the engine.

    `max_batch_size` is the rows of one call of the model, where a picture with classifier-free guidance is two; what is
    measured at warm-up may keep batches smaller. `max_active` requests are in progress and `max_waiting` wait;
    `max_admitted` may be encoded between two steps of the others. `max_waiting_seconds` bounds the estimated seconds of work that
    is accepted and not done, None for no bound; `max_client_waiting` the requests of one client that have not ended.
    """

    max_batch_size: int = setting(16, "most rows of a model call, two a guided picture", metavar="N", least=1)
    max_active: int = setting(32, "requests that may be in progress", metavar="N", least=1)
    max_waiting: int = setting(256, "requests that may wait", metavar="N", least=1)
    max_admitted: int = setting(4, "requests that may be encoded between two steps of the others", metavar="N", least=1)
    max_waiting_seconds: float | None = setting(
        None, "estimated seconds of work that may wait; beyond, requests are refused (default: no bound)", metavar="SECONDS"
    )
    max_client_waiting: int = setting(128, "requests of one client that may wait or run", metavar="N", least=1)


class Scheduler:
    """The requests of all models. The order of admission and of turns is the policy's, which see."""

    def __init__(self, limits: Limits, costs: Costs, max_rows: dict[str, int | None]) -> None:
        self.limits = limits
        self.waiting: list[Ticket] = []
        self.active: list[Ticket] = []
        self._costs = costs
        self._max_rows = max_rows
        self._policy = Policy(costs, limits.max_batch_size)
        self._bias: dict[Hashable, tuple[float, int]] = {}

    def __len__(self) -> int:
        return len(self.waiting) + len(self.active)

    def has(self, model: str) -> bool:
        """Whether any request of `model` is in."""
        return any(ticket.request.model == model for ticket in (*self.active, *self.waiting))

    def set_max_rows(self, model: str, rows: int | None) -> None:
        """Sets the most rows that one call of `model` takes, None for no limit."""
        self._max_rows[model] = rows

    def drop(self, now: float) -> list[tuple[Ticket, ServerError]]:
        """Takes out every request that was cancelled or whose deadline has passed, with the reason."""
        leaving = [(ticket, error) for ticket in (*self.active, *self.waiting) if (error := _gone(ticket, now))]
        for ticket, _ in leaving:
            self.remove(ticket)
        return leaving

    def admit(self, now: float) -> list[Ticket]:
        """Makes waiting requests active: a few that share a shape, so that the running ones wait for one encoding at most."""
        room = min(self.limits.max_admitted, self.limits.max_active - len(self.active))
        if not self.waiting or room <= 0:
            return []
        order = sorted(self.waiting, key=lambda ticket: self._job(ticket).rank(now))
        chosen = [ticket for ticket in order if ticket.group == order[0].group][:room]
        for ticket in chosen:
            self.waiting.remove(ticket)
            self.active.append(ticket)
        return chosen

    def next_batch(self, now: float) -> list[Ticket]:
        """The requests of the next call."""
        if len(self.active) < 2:
            return list(self.active)
        batch = self._policy.next_batch(list(map(self._job, self.active)), len(self.waiting), self._max_rows, now)
        tickets = {ticket.number: ticket for ticket in self.active}
        for ticket in self.active:
            ticket.passed_over += 1
        chosen = [tickets[job.number] for job in batch]
        for ticket in chosen:
            ticket.passed_over = 0
        return chosen

    def remove(self, ticket: Ticket) -> None:
        """Takes a request out, wherever it is."""
        (self.waiting if ticket in self.waiting else self.active).remove(ticket)

    def position(self, ticket: Ticket, now: float) -> int:
        """How many of the waiting requests come before `ticket`."""
        rank = self._job(ticket).rank(now)
        return sum(self._job(other).rank(now) < rank for other in self.waiting if other is not ticket)

    def places(self, now: float) -> list[tuple[Ticket, int]]:
        """Every waiting request, and how many come before it."""
        order = sorted(self.waiting, key=lambda ticket: self._job(ticket).rank(now))
        return [(ticket, position) for position, ticket in enumerate(order)]

    def forecast(self, ticket: Ticket, now: float) -> float | None:
        """Seconds until `ticket`, which need not be in yet, would be finished if no other came. None while costs are unknown."""
        if self._costs.seconds("denoise", ticket.group, ticket.plan.pixels, ticket.plan.rows) is None:
            return None
        tickets = {other.number: other for other in (*self.active, *self.waiting, ticket)}
        jobs = [self._job(other) for other in tickets.values()]
        if len(jobs) > _MOST_FORECAST:
            own = self._job(ticket).seconds_left
            return sum(min(job.seconds_left, own) for job in jobs)
        return self._policy.forecast(jobs, self._max_rows, now)[ticket.number] - now

    def check_deadline(self, ticket: Ticket) -> None:
        """Raises DeadlineUnmeetable where the forecast ends after the deadline, though a deadline comes before all else."""
        deadline, forecast = ticket.request.deadline, ticket.forecast
        if deadline is not None and forecast is not None and ticket.arrival + forecast > deadline:
            left = max(0.0, deadline - ticket.arrival)
            raise DeadlineUnmeetable(f"it would take about {forecast:.2f} s, and {left:.2f} s are left", estimate=forecast)

    def look_ahead(self, now: float) -> None:
        """Sets anew when each request is expected to be finished."""
        tickets = (*self.active, *self.waiting)
        if not tickets or len(tickets) > _MOST_FORECAST:
            return
        ends = self._policy.forecast(map(self._job, tickets), self._max_rows, now)
        for ticket in tickets:
            if ticket.forecast is not None:
                ticket.expected = now + self.estimate(ticket, ends[ticket.number] - now)

    def estimate(self, ticket: Ticket, forecast: float) -> float:
        """The forecast corrected by what forecasts like it were wrong by: others do come. A few cases count little."""
        mean, count = self._bias.get(self._likeness(ticket), (0.0, 0))
        return forecast * math.exp(mean * count / (count + _CAUTION))

    def learn(self, ticket: Ticket, seconds: float) -> None:
        """Notes how long a request took whose forecast was told when it came."""
        if not ticket.forecast or seconds <= 0:
            return
        mean, count = self._bias.get(ticket.likeness, (0.0, 0))
        share = max(_LEAST_WEIGHT, 1 / (count + 1))
        self._bias[ticket.likeness] = (mean + share * (math.log(seconds / ticket.forecast) - mean), count + 1)

    def _likeness(self, ticket: Ticket) -> Hashable:
        """Forecasts are wrong alike for about the same number of steps, among about as many others."""
        if ticket.likeness is None:
            ticket.likeness = ticket.plan.step_count.bit_length(), len(self).bit_length()
        return ticket.likeness

    def _job(self, ticket: Ticket) -> Job:
        plan = ticket.plan

        def seconds(stage: Stage, rows: int, unknown: float) -> float:
            known = self._costs.seconds(stage, ticket.group, plan.pixels, rows)
            return unknown if known is None else known

        return Job(
            number=ticket.number,
            group=ticket.group,
            pixels=plan.pixels,
            rows=plan.rows,
            steps_left=ticket.steps_left,
            deadline=ticket.request.deadline,
            step_seconds=seconds("denoise", plan.rows, 1.0),
            setup=seconds("prepare", 1, 0.0) if ticket.state is None else 0.0,
            ending=seconds("finish", len(ticket.request.seeds), 0.0),
            passed_over=ticket.passed_over,
            background=ticket.request.background,
        )


def _gone(ticket: Ticket, now: float) -> ServerError | None:
    if ticket.cancelled:
        return RequestCancelled("the request was cancelled")
    deadline = ticket.request.deadline
    if deadline is not None and deadline <= now:
        return DeadlineExpired("the deadline passed before the request was finished")
    return None

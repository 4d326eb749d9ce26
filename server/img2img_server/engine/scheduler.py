"""Decides who is admitted, who shares the next call of the model, and who has to leave. Computes nothing itself."""

import math
from collections.abc import Hashable
from dataclasses import dataclass

from img2img_server.engine.request import Ticket
from img2img_server.errors import DeadlineExpired, RequestCancelled, ServerError


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the engine: pictures in one call of the model, requests in progress, requests waiting."""

    max_batch_size: int = 8
    max_active: int = 32
    max_waiting: int = 256


class Scheduler:
    """The waiting and the active requests of all models.

    Requests wait by earliest deadline, then by arrival. The active ones take turns, a model call each: among those that
    share a model and a shape everybody joins, up to the batch size, and the groups and their members rotate so that who was
    served longest ago comes first. So no request blocks another, and nobody waits longer than one turn of all others.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting: list[Ticket] = []
        self.active: list[Ticket] = []
        self._turn = 0

    def __len__(self) -> int:
        return len(self.waiting) + len(self.active)

    def drop(self, now: float) -> list[tuple[Ticket, ServerError]]:
        """Takes out every request that was cancelled or whose deadline has passed, with the reason."""
        leaving = [(ticket, error) for ticket in (*self.active, *self.waiting) if (error := _gone(ticket, now))]
        for ticket, _ in leaving:
            self.remove(ticket)
        return leaving

    def admit(self) -> list[Ticket]:
        """Makes waiting requests active: one between two steps, so that the running ones never wait for more than one."""
        if not self.waiting or len(self.active) >= self.limits.max_active:
            return []
        ticket = min(self.waiting, key=_by_deadline)
        self.waiting.remove(ticket)
        self.active.append(ticket)
        self._serve(ticket)
        return [ticket]

    def next_batch(self, max_rows: dict[str, int | None]) -> list[Ticket]:
        """The requests of the next call; `max_rows` bounds the pictures of a call by model, beside the batch size."""
        order = sorted(self.active, key=lambda ticket: ticket.served)
        if not order:
            return []
        model = order[0].request.model
        room = min(self.limits.max_batch_size, max_rows[model] or self.limits.max_batch_size)
        batch: list[Ticket] = []
        for ticket in (ticket for ticket in order if _group(ticket) == _group(order[0])):
            rows = len(ticket.request.seeds)
            if batch and rows > room:
                break
            batch.append(ticket)
            room -= rows
        for ticket in batch:
            self._serve(ticket)
        return batch

    def remove(self, ticket: Ticket) -> None:
        """Takes a request out, wherever it is."""
        (self.waiting if ticket in self.waiting else self.active).remove(ticket)

    def _serve(self, ticket: Ticket) -> None:
        self._turn += 1
        ticket.served = self._turn


def _gone(ticket: Ticket, now: float) -> ServerError | None:
    if ticket.cancelled:
        return RequestCancelled("the request was cancelled")
    deadline = ticket.request.deadline
    if deadline is not None and deadline <= now:
        return DeadlineExpired("the deadline passed before the request was finished")
    return None


def _by_deadline(ticket: Ticket) -> tuple[float, int]:
    deadline = ticket.request.deadline
    return (math.inf if deadline is None else deadline, ticket.number)


def _group(ticket: Ticket) -> tuple[str, Hashable]:
    assert ticket.state is not None, "an active request is prepared"
    return ticket.request.model, ticket.state.shape

"""One stage for many requests: in one call of their model where that works, and in smaller ones where it does not."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from img2img_server.engine.costs import STAGES, Costs
from img2img_server.engine.request import Pipeline, Ticket
from img2img_server.engine.spans import Span
from img2img_server.engine.under_way import UnderWay
from img2img_server.errors import ModelFailed, OutOfMemory, ServerError

_log = logging.getLogger(__name__)

_R = TypeVar("_R")

Work = Callable[[Pipeline, Sequence[Ticket]], Sequence[_R]]
"""A stage: what a pipeline makes of tickets, a result for each."""


class Calls:
    """Makes the calls of models, times them and finds out what they have room for.

    `pipelines` may change between two calls. `lock` guards `costs`; `clock` is the engine's; `observe` is told of every call that
    worked. Once the engine was given up no call is made any more: Abandoned is raised in its place.
    """

    def __init__(
        self,
        pipelines: Mapping[str, Pipeline],
        costs: Costs,
        lock: AbstractContextManager[Any],
        clock: Callable[[], float],
        observe: Callable[[Span], None],
        under_way: UnderWay,
    ) -> None:
        self._pipelines = pipelines
        self._costs = costs
        self._lock = lock
        self._clock = clock
        self._observe = observe
        self._under_way = under_way

    def run(
        self, stage: str, tickets: Sequence[Ticket], work: Work[_R]
    ) -> tuple[list[tuple[Ticket, _R]], list[tuple[Ticket, ServerError]]]:
        """Lets the model of `tickets` do one stage of them together: their results, and the errors of those that failed.

        Those that have no room together are tried in halves, and calls stay smaller from then on; those that fail otherwise are
        tried alone, so that only those end whose own failure it is.
        """
        done: list[tuple[Ticket, _R]] = []
        failed: list[tuple[Ticket, ServerError]] = []
        left = self._parts(stage, tickets)
        while left:
            some = left.pop(0)
            results, error = self.once(stage, some, work)
            if error is None:
                done += zip(some, results, strict=True)
                continue
            full = isinstance(error, OutOfMemory)
            if full:
                self._forbid(stage, some)
            if len(some) == 1:
                failed.append((some[0], _told(error, some[0])))
            elif full:
                left[:0] = [some[: len(some) // 2], some[len(some) // 2 :]]
            else:
                left[:0] = [[ticket] for ticket in some]
            # The error holds on to what the call's frames held, and that may be what the next one has no room for.
            del error
        return done, failed

    def once(self, stage: str, tickets: Sequence[Ticket], work: Work[_R]) -> tuple[Sequence[_R], Exception | None]:
        """One call for all `tickets`: a result for each, or what it raised."""
        model, rows, begun = tickets[0].request.model, _rows(stage, tickets), self._clock()
        self._under_way.check()
        with self._under_way.call(stage, model, len(tickets), rows):
            results, error = _attempt(self._pipelines[model], tickets, work)
        if error is None:
            self._note(stage, tickets, begun)
        return results, error

    def _note(self, stage: str, tickets: Sequence[Ticket], begun: float) -> None:
        """Tells of a call that worked, and learns what it takes."""
        seconds, rows = self._clock() - begun, _rows(stage, tickets)
        if stage in STAGES:
            with self._lock:
                self._costs.record(stage, tickets[0].group, tickets[0].plan.pixels, rows, seconds)
        members = tuple(ticket.request for ticket in tickets)
        self._observe(Span(stage, tickets[0].request.model, len(tickets), rows, begun, seconds, members))

    def _parts(self, stage: str, tickets: Sequence[Ticket]) -> list[Sequence[Ticket]]:
        """`tickets` in calls of no more rows than there was room for. One that has more of its own is alone."""
        if not tickets or stage not in STAGES:
            return [tickets] if tickets else []
        with self._lock:
            room = self._costs.room(stage, tickets[0].request.model, tickets[0].plan.pixels)
        parts: list[list[Ticket]] = []
        for ticket in tickets:
            if parts and (room is None or _rows(stage, [*parts[-1], ticket]) <= room):
                parts[-1].append(ticket)
            else:
                parts.append([ticket])
        return list(parts)

    def _forbid(self, stage: str, tickets: Sequence[Ticket]) -> None:
        """Notes that there was no room for such a call."""
        model, plan, rows = tickets[0].request.model, tickets[0].plan, _rows(stage, tickets)
        _log.warning("model '%s' ran out of memory: %s, %d rows of %d pixels", model, stage, rows, plan.pixels)
        if stage in STAGES:
            with self._lock:
                self._costs.forbid(model, plan.pixels, rows, stage, largest=max(1, rows // 2))


def _attempt(pipeline: Pipeline, tickets: Sequence[Ticket], work: Work[_R]) -> tuple[Sequence[_R], Exception | None]:
    try:
        return work(pipeline, tickets), None
    except Exception as error:  # noqa: BLE001 - whatever a model raises: its requests end, the engine goes on
        return (), error
    except BaseException as error:  # noqa: BLE001 - such as a panic of a library in Rust: it must not end the engine's thread
        return (), RuntimeError(f"{type(error).__name__}: {error}")


def _rows(stage: str, tickets: Sequence[Ticket]) -> int:
    """What a call of a stage grows with: samples of the model's, or pictures."""
    if stage == "prepare":
        return len(tickets)  # a picture is encoded once, however many are made of it
    return sum(ticket.plan.rows if stage == "denoise" else len(ticket.request.seeds) for ticket in tickets)


def _told(error: Exception, ticket: Ticket) -> ServerError:
    """The error as its caller sees it."""
    if isinstance(error, OutOfMemory):
        (width, height), count = ticket.request.image.size, len(ticket.request.seeds)
        return OutOfMemory(f"no memory for {count} {'picture' if count == 1 else 'pictures'} of {width} x {height} pixels")
    if isinstance(error, ServerError):
        return error
    extra = {"request_id": ticket.request.id}
    _log.error("model '%s' failed", ticket.request.model, exc_info=error, extra=extra)
    return ModelFailed("the model failed on this request")

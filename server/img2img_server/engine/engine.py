"""The engine: one thread that owns the device and takes all requests one step further at a time."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from img2img_server.engine.calls import Calls, Work
from img2img_server.engine.costs import Costs
from img2img_server.engine.request import (
    Completed,
    Ending,
    Failed,
    Listener,
    Pipeline,
    Progress,
    Queued,
    Request,
    Started,
    State,
    Ticket,
    Timings,
)
from img2img_server.engine.scheduler import Limits, Scheduler
from img2img_server.engine.spans import Span, ignore
from img2img_server.errors import ModelFailed, QueueFull, ServerError, ShuttingDown

_log = logging.getLogger(__name__)

_NEWS = 1.0
"""Seconds between two tellings of a waiting request's place."""

_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class Accepted:
    """What the caller learns at once: the ticket, how many wait before it, and the estimated seconds until it is done."""

    ticket: Ticket
    position: int
    eta: float | None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """How busy the engine is.

    Requests that wait and that are in progress, the estimated seconds of what they still need, None where costs are unknown,
    and the seconds that the current call of a model has taken so far, 0 between two calls.
    """

    waiting: int
    active: int
    work_seconds: float | None
    call_seconds: float


class Engine:
    """Runs requests of several models with step-level continuous batching.

    Every accepted request ends exactly once: its listener is called with Completed or Failed, on the engine's thread. Without
    start(), nothing runs by itself: a test calls step(). `clock` gives seconds and never goes back. `observe` is told of
    every stage that ran.
    """

    def __init__(
        self,
        pipelines: Mapping[str, Pipeline],
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        observe: Callable[[Span], None] = ignore,
    ) -> None:
        self._pipelines = dict(pipelines)
        self.costs = Costs()
        max_rows = {name: pipeline.max_rows for name, pipeline in self._pipelines.items()}
        self._scheduler = Scheduler(limits or Limits(), self.costs, max_rows)
        self._clock = clock
        self._changed = threading.Condition()
        self._calls = Calls(self._pipelines, self.costs, self._changed, clock, observe)
        self._numbers = itertools.count(1)
        self._thread = threading.Thread(target=self._run, name="img2img-engine", daemon=True)
        self._draining = False
        self._stopping = False
        self._news_told = 0.0

    @property
    def clock(self) -> Callable[[], float]:
        """The engine's clock: what deadlines are measured on."""
        return self._clock

    def start(self) -> None:
        """Starts the engine's thread."""
        self._thread.start()

    def replace(self, model: str, pipeline: Pipeline) -> None:
        """From its next call on, runs `model` by `pipeline`, requests in progress among them; adds it where it is new.

        The states of the one before must be good for it, too: it is of the same class, over the same components.
        """
        with self._changed:
            self._pipelines[model] = pipeline
            self._scheduler.set_max_rows(model, pipeline.max_rows)

    def remove(self, model: str) -> None:
        """Forgets `model`, which must have no requests left."""
        with self._changed:
            assert not self._scheduler.has(model), f"{model} has requests"
            del self._pipelines[model]

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no new requests and waits until the accepted ones have ended. False where `timeout` seconds were too few."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not len(self._scheduler), timeout)

    def close(self) -> None:
        """Stops after the current step. Requests that have not ended then end with ShuttingDown."""
        with self._changed:
            self._draining = self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._end_all(ShuttingDown("the server stopped before the request was finished"))

    def submit(self, request: Request, listener: Listener) -> Accepted:
        """Accepts a request from any thread; its events go to `listener` on the engine's thread, which must not block.

        Raises at once where it cannot be taken: InvalidField, QueueFull, ShuttingDown, or DeadlineUnmeetable where even now
        the deadline is nearer than the request's end.
        """
        plan = self._pipelines[request.model].plan(request)
        with self._changed:
            if self._draining:
                raise ShuttingDown("the server is shutting down")
            now, scheduler = self._clock(), self._scheduler
            ticket = Ticket(request, plan, listener, next(self._numbers), now)
            ticket.forecast = scheduler.forecast(ticket, now)
            eta = None if ticket.forecast is None else scheduler.estimate(ticket, ticket.forecast)
            ticket.expected = None if eta is None else now + eta
            if len(scheduler.waiting) >= scheduler.limits.max_waiting:
                raise QueueFull(f"{len(scheduler.waiting)} requests are waiting already", retry_after=max(1.0, eta or 0.0))
            scheduler.check_deadline(ticket)
            scheduler.waiting.append(ticket)
            ticket.position = scheduler.position(ticket, now)
            self._changed.notify_all()
            return Accepted(ticket, ticket.position, eta)

    @property
    def stats(self) -> EngineStats:
        """How busy it is; any thread may ask."""
        with self._changed:
            return EngineStats(len(self._scheduler.waiting), len(self._scheduler.active), None, 0.0)

    def abandon(self, error: ServerError) -> None:
        """Ends every request with `error` although the engine's thread may be inside a call. Nothing can be run afterwards."""
        with self._changed:
            self._draining = self._stopping = True
        self._end_all(error)

    def step(self) -> bool:
        """One round: admit, denoise one batch, advance each of it, deliver the finished. Returns whether work is left."""
        with self._changed:
            leaving = self._scheduler.drop(self._clock())
            arriving = self._scheduler.admit(self._clock())
        for ticket, error in leaving:
            self._end(ticket, Failed(error))
        self._prepare(arriving)
        with self._changed:
            batch = self._scheduler.next_batch(self._clock())
        self._advance(self._denoise(batch))
        self._finish([ticket for ticket in batch if ticket.state is not None and ticket.steps_left <= 0])
        self._tell_news()
        with self._changed:
            self._changed.notify_all()
            return bool(len(self._scheduler))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or len(self._scheduler))
                if self._stopping:
                    return
            try:
                self.step()
            except Exception:  # noqa: BLE001 - a bug of ours must not leave callers waiting for ever
                _log.exception("the engine's step failed")
                self._end_all(ModelFailed("the server failed"))

    def _prepare(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            ticket.started = self._clock()
        for ticket, state in self._call("prepare", tickets, lambda pipeline, some: pipeline.prepare(_requests(some))):
            ticket.state, ticket.prepared = state, self._clock()
            ticket.tell(Started(state.step_count))

    def _denoise(self, batch: Sequence[Ticket]) -> list[tuple[Ticket, Any]]:
        return self._call("denoise", batch, lambda pipeline, some: pipeline.denoise(_states(some)))

    def _advance(self, predicted: Sequence[tuple[Ticket, Any]]) -> None:
        noises, before = dict(predicted), {ticket: _step(ticket) for ticket, _ in predicted}

        def advance(pipeline: Pipeline, tickets: Sequence[Ticket]) -> Sequence[None]:
            # Asked again after a failure, those that have moved already are not moved twice.
            still = [ticket for ticket in tickets if _step(ticket) == before[ticket]]
            if still:
                pipeline.advance(_states(still), [noises[ticket] for ticket in still])
            return [None] * len(tickets)

        # A pipeline that runs whole also works on what is no step of the picture.
        moved = [ticket for ticket, _ in self._call("advance", list(noises), advance) if _step(ticket) != before[ticket]]
        previews = self._preview([ticket for ticket in moved if _wants_preview(ticket)])
        now = self._clock()
        for ticket in moved:
            eta = None if ticket.expected is None else max(0.0, ticket.expected - now)
            step = _step(ticket)
            ticket.tell(Progress(step, step + ticket.steps_left, eta, previews.get(ticket)))

    def _preview(self, tickets: Sequence[Ticket]) -> dict[Ticket, Any]:
        if not tickets:
            return {}
        begun = self._clock()
        try:
            previews = self._pipeline(tickets[0]).preview(_states(tickets))
        except Exception:  # noqa: BLE001 - whatever a model raises: the picture itself counts more
            _log.exception("model '%s' failed to draw a preview", tickets[0].request.model)
            return {}
        self._calls.note("preview", tickets, begun)
        return dict(zip(tickets, previews, strict=True))

    def _finish(self, tickets: Sequence[Ticket]) -> None:
        denoised = self._clock()
        for ticket, images in self._call("finish", tickets, lambda pipeline, some: pipeline.finish(_states(some))):
            timings = Timings(
                queue=ticket.started - ticket.arrival,
                encode=ticket.prepared - ticket.started,
                denoise=denoised - ticket.prepared,
                decode=self._clock() - denoised,
            )
            with self._changed:
                self._scheduler.learn(ticket, self._clock() - ticket.arrival)
            self._leave(ticket, Completed(tuple(images), timings))

    def _call(self, stage: str, tickets: Sequence[Ticket], work: Work[_R]) -> list[tuple[Ticket, _R]]:
        """One stage of `tickets`: the result of each that did not fail. The others end with their error."""
        done, failed = self._calls.run(stage, tickets, work)
        for ticket, error in failed:
            self._leave(ticket, Failed(error))
        return done

    def _tell_news(self) -> None:
        """Every now and then, looks ahead anew and tells those who wait where their place has changed."""
        now = self._clock()
        if now - self._news_told < _NEWS:
            return
        self._news_told = now
        with self._changed:
            self._scheduler.look_ahead(now)
            places = self._scheduler.places(now)
        for ticket, position in places:
            if position != ticket.position:
                ticket.position = position
                ticket.tell(Queued(position, None if ticket.expected is None else max(0.0, ticket.expected - now)))

    def _leave(self, ticket: Ticket, ending: Ending) -> None:
        with self._changed:
            self._scheduler.remove(ticket)
        self._end(ticket, ending)

    def _end(self, ticket: Ticket, ending: Ending) -> None:
        state, ticket.state = ticket.state, None
        if state is not None:
            try:
                self._pipeline(ticket).release(state)
            except Exception:  # noqa: BLE001 - the request's own ending counts more
                _log.exception("model '%s' failed to release a request", ticket.request.model)
        ticket.end(ending)

    def _end_all(self, error: ServerError) -> None:
        with self._changed:
            tickets = [*self._scheduler.active, *self._scheduler.waiting]
            for ticket in tickets:
                self._scheduler.remove(ticket)
            self._changed.notify_all()
        for ticket in tickets:
            self._end(ticket, Failed(error))

    def _pipeline(self, ticket: Ticket) -> Pipeline:
        return self._pipelines[ticket.request.model]


def _requests(tickets: Sequence[Ticket]) -> list[Request]:
    return [ticket.request for ticket in tickets]


def _states(tickets: Sequence[Ticket]) -> list[State]:
    return [ticket.state for ticket in tickets if ticket.state is not None]


def _step(ticket: Ticket) -> int:
    assert ticket.state is not None, "a batch holds prepared requests only"
    return ticket.state.step


def _wants_preview(ticket: Ticket) -> bool:
    interval = ticket.request.preview_interval
    return interval > 0 and ticket.steps_left > 0 and _step(ticket) % interval == 0

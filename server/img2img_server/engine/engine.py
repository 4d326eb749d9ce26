"""The engine: one thread that owns the device and takes all requests one step further at a time."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from img2img_server.engine.request import (
    Completed,
    Ending,
    Failed,
    Listener,
    Pipeline,
    Progress,
    Request,
    Started,
    Ticket,
    Timings,
)
from img2img_server.engine.scheduler import Limits, Scheduler
from img2img_server.errors import ModelFailed, QueueFull, ServerError, ShuttingDown

_log = logging.getLogger(__name__)

_SMOOTHING = 0.2
"""Weight of the newest step in the running mean of step times."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """What the caller learns at once: the ticket, how many wait before it, and the estimated seconds until it is done."""

    ticket: Ticket
    position: int
    eta: float | None


class Engine:
    """Runs requests of several models with step-level continuous batching.

    Every accepted request ends exactly once: its listener is called with Completed or Failed, on the engine's thread. Without
    start(), nothing runs by itself: a test calls step(). `clock` gives seconds and never goes back.
    """

    def __init__(
        self,
        pipelines: Mapping[str, Pipeline],
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pipelines = dict(pipelines)
        self._max_rows = {name: pipeline.max_rows for name, pipeline in self._pipelines.items()}
        self._scheduler = Scheduler(limits or Limits())
        self._clock = clock
        self._changed = threading.Condition()
        self._numbers = itertools.count(1)
        self._thread = threading.Thread(target=self._run, name="img2img-engine", daemon=True)
        self._draining = False
        self._stopping = False
        self._step_seconds: float | None = None

    @property
    def clock(self) -> Callable[[], float]:
        """The engine's clock: what deadlines are measured on."""
        return self._clock

    def start(self) -> None:
        """Starts the engine's thread."""
        self._thread.start()

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

        Raises QueueFull or ShuttingDown at once where it cannot be taken.
        """
        with self._changed:
            if self._draining:
                raise ShuttingDown("the server is shutting down")
            scheduler = self._scheduler
            eta = self._estimate(request)
            if len(scheduler.waiting) >= scheduler.limits.max_waiting:
                raise QueueFull(f"{len(scheduler.waiting)} requests are waiting already", retry_after=max(1.0, eta or 0.0))
            ticket = Ticket(request, listener, next(self._numbers), self._clock())
            position = len(scheduler.waiting)
            scheduler.waiting.append(ticket)
            self._changed.notify_all()
            return Accepted(ticket, position, eta)

    def step(self) -> bool:
        """One round: admit, denoise one batch, advance each of it, deliver the finished. Returns whether work is left."""
        with self._changed:
            leaving = self._scheduler.drop(self._clock())
            arriving = self._scheduler.admit()
        for ticket, error in leaving:
            self._end(ticket, Failed(error))
        for ticket in arriving:
            self._prepare(ticket)
        batch = self._scheduler.next_batch(self._max_rows)
        for ticket, noise in zip(batch, self._denoise(batch), strict=False):
            self._advance(ticket, noise)
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

    def _prepare(self, ticket: Ticket) -> None:
        ticket.started = self._clock()
        state = self._attempt([ticket], lambda: self._pipeline(ticket).prepare(ticket.request))
        if state is not None:
            ticket.state, ticket.prepared = state, self._clock()
            ticket.tell(Started(state.step_count))

    def _denoise(self, batch: Sequence[Ticket]) -> Sequence[Any]:
        if not batch:
            return ()
        before = self._clock()
        noises = self._attempt(batch, lambda: self._pipeline(batch[0]).denoise([ticket.state for ticket in batch]))
        seconds = (self._clock() - before) / sum(len(ticket.request.seeds) for ticket in batch)
        known = self._step_seconds
        self._step_seconds = seconds if known is None else known + _SMOOTHING * (seconds - known)
        return noises or ()

    def _advance(self, ticket: Ticket, noise: Any) -> None:
        state = ticket.state
        assert state is not None, "a batch holds prepared requests only"
        before = state.step

        def advance() -> bool:
            self._pipeline(ticket).advance(state, noise)
            return True

        if self._attempt([ticket], advance) is None:
            return
        if state.step > before:
            ticket.tell(Progress(state.step, state.step_count))
        if state.step >= state.step_count:
            self._finish(ticket)

    def _finish(self, ticket: Ticket) -> None:
        denoised = self._clock()
        images = self._attempt([ticket], lambda: self._pipeline(ticket).finish(ticket.state))
        if images is None:
            return
        timings = Timings(
            queue=ticket.started - ticket.arrival,
            encode=ticket.prepared - ticket.started,
            denoise=denoised - ticket.prepared,
            decode=self._clock() - denoised,
        )
        self._leave(ticket, Completed(tuple(images), timings))

    def _attempt(self, tickets: Sequence[Ticket], work: Callable[[], Any]) -> Any:
        """Lets a model work for `tickets`. Where that fails they all end with the error, and None is returned."""
        try:
            return work()
        except ServerError as error:
            ending = Failed(error)
        except Exception:  # noqa: BLE001 - whatever a model raises: its requests end, the engine goes on
            _log.exception("model '%s' failed", tickets[0].request.model)
            ending = Failed(ModelFailed("the model failed on this request"))
        for ticket in tickets:
            self._leave(ticket, ending)
        return None

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

    def _estimate(self, request: Request) -> float | None:
        """Seconds until `request` would be done, from the mean time of a picture's step; None before the first step."""
        if self._step_seconds is None:
            return None
        ahead = sum(map(_remaining, (*self._scheduler.active, *self._scheduler.waiting)))
        return (ahead + _planned(request)) * self._step_seconds


def _planned(request: Request) -> int:
    return int(request.num_inference_steps * request.strength) * len(request.seeds)


def _remaining(ticket: Ticket) -> int:
    state = ticket.state
    if state is None:
        return _planned(ticket.request)
    return (state.step_count - state.step) * len(ticket.request.seeds)

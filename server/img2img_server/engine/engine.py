"""The engine: one thread that owns the device and takes all requests one step further at a time."""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from copy import copy
from typing import Any, TypeVar

from img2img_server.engine.admission import Admission, Slot
from img2img_server.engine.costs import Costs, Measured
from img2img_server.engine.executor import Abandoned, CallsInFlight, Executor
from img2img_server.engine.interface import Accepted as Accepted
from img2img_server.engine.interface import EngineStats as EngineStats
from img2img_server.engine.interface import ModelCall, Span, ignore
from img2img_server.engine.request import Completed, Ending, Failed, Listener, Pipeline, Queued, Request, Ticket
from img2img_server.engine.scheduler import QueueLimits, Scheduler
from img2img_server.errors import ModelFailed, ModelNotLoaded, ServerError, ShuttingDown

_log = logging.getLogger(__name__)

_NEWS = 1.0
"""Seconds between two tellings of a waiting request's place."""

_R = TypeVar("_R")


class Engine:
    """Runs requests of several models with step-level continuous batching.

    Every accepted request ends exactly once: its listener is called with Completed or Failed, on the engine's thread, or on that
    of whoever closes or abandons it. Without start(), nothing runs by itself: a test calls step(). `clock` gives seconds and
    never goes back. `observe` is told of every stage that ran.
    """

    def __init__(
        self,
        pipelines: Mapping[str, Pipeline],
        limits: QueueLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        observe: Callable[[Span], None] = ignore,
    ) -> None:
        self._pipelines = dict(pipelines)
        self.costs = Costs()
        max_rows = {name: pipeline.max_rows for name, pipeline in self._pipelines.items()}
        self._scheduler = Scheduler(limits or QueueLimits(), self.costs, max_rows)
        for name, pipeline in self._pipelines.items():
            self.costs.pad(name, pipeline.row_buckets)
        self._clock = clock
        self._changed = threading.Condition()
        self._in_flight = CallsInFlight(clock)
        self._executor = Executor(
            self._pipelines,
            self.costs,
            self._changed,
            clock,
            observe,
            self._in_flight,
            lambda ticket, error: self._leave(ticket, Failed(error)),
        )
        self._room = Admission(self._scheduler)
        self._numbers = itertools.count(1)
        self._turns, self._resting = 0, True  # rounds of the thread, and whether it is between two of them
        self._thread = self._new_thread()
        self._errands: deque[tuple[str, Callable[[], Any], Future[Any]]] = deque()
        self._running = False
        self._draining = False
        self._stopping = False
        self._abandoned: ServerError | None = None
        self._news_told = 0.0

    @property
    def clock(self) -> Callable[[], float]:
        """The engine's clock: what deadlines are measured on."""
        return self._clock

    def start(self) -> None:
        """Starts the engine's thread."""
        with self._changed:
            if not self._running:
                self._running = True
                self._thread.start()

    def call(self, model: str, work: Callable[[], _R]) -> _R:
        """What `work` returns or raises, on the engine's thread, between two rounds; starts that thread if it does not run yet.

        What `model` records while it warms up must be recorded there. Raises ShuttingDown if the engine stops before that.
        """
        done: Future[_R] = Future()
        with self._changed:
            if self._stopping:
                raise ShuttingDown("the server is shutting down")
            self._errands.append((model, work, done))
            self._changed.notify_all()
            self.start()
        return done.result()

    def renew(self) -> None:
        """Goes on with another thread: this one is in a call that does not come back. Only before requests are accepted."""
        with self._changed:
            self._in_flight.forget(self._thread)
            self._thread = self._new_thread()
            self._thread.start()

    def replace(self, model: str, pipeline: Pipeline) -> None:
        """From its next call on, runs `model` by `pipeline`, requests in progress among them; adds it where it is new.

        The states of the one before must be good for it, too: it is of the same class, over the same components.
        """
        with self._changed:
            self._pipelines[model] = pipeline
            self._scheduler.set_max_rows(model, pipeline.max_rows)
            self.costs.pad(model, pipeline.row_buckets)

    def adopt(self, model: str, measured: Measured) -> None:
        """Notes what was measured of `model`, unless more has been learnt of it since."""
        with self._changed:
            if not self.costs.knows(model):
                self.costs.adopt(model, measured)

    def settle(self, model: str) -> bool:
        """Waits until no request of `model` is left, and nothing of one. False where the engine stops before that."""
        with self._changed:
            self._changed.wait_for(lambda: not self._scheduler.has(model) or self._stopping)
            turn = self._turns  # the step that ended the last one has still something of it in its hands
            self._changed.wait_for(lambda: self._resting or self._turns != turn or self._stopping)
            return not self._scheduler.has(model) and self._abandoned is None

    def remove(self, model: str) -> None:
        """Forgets `model`, which must have no requests left."""
        with self._changed:
            assert not self._scheduler.has(model), f"{model} has requests"
            del self._pipelines[model]

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no new requests and waits until the accepted ones have ended. False where `timeout` seconds were too few."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._scheduler.tickets, timeout)

    def close(self) -> None:
        """Stops after the current step, or at once where the engine was abandoned. Requests that have not ended then end with
        ShuttingDown."""
        with self._changed:
            self._draining = self._stopping = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._running or self._abandoned is not None)
        self._end_all(ShuttingDown("the server stopped before the request was finished"))

    @contextmanager
    def arriving(self, client: str = "") -> Iterator[Slot]:
        """Within the block a request of `client` holds a place among those that wait until it is submitted, and counts as its
        client's to the end. Raises at once what `submit` would for any request of that client, before work goes into it."""
        place = Slot(client)
        with self._changed:
            self._check_open()
            self._room.check(client, self._clock())
            self._room.take(place)
        try:
            yield place
        finally:
            with self._changed:
                self._room.leave(place)

    def submit(self, request: Request, listener: Listener, place: Slot | None = None, bounded: bool = True) -> Accepted:
        """Accepts a request from any thread; its events go to `listener` on the engine's thread, which must not block.

        `place` is what it held while it arrived. One that is not `bounded` is the server's own, and taken however many wait: they
        may be waiting for it. Raises at once where it cannot be taken: InvalidField, QueueFull, ClientBusy,
        ModelNotLoaded, ShuttingDown, what the engine was abandoned with, or DeadlineUnmeetable where even now the deadline is
        nearer than the request's end.
        """
        with self._in_flight.call("plan", request.model):
            plan = self._pipeline(request.model).plan(request)
        with self._changed:
            if place is not None:
                self._room.leave(place)
            self._check_open()
            self._pipeline(request.model)
            now, scheduler = self._clock(), self._scheduler
            if bounded:
                self._room.check(request.client, now, request.background)
            ticket = Ticket(request, plan, listener, next(self._numbers), now)
            ticket.position, ticket.forecast = scheduler.look_at(ticket, now)
            eta = None if ticket.forecast is None else scheduler.estimate(ticket, ticket.forecast)
            ticket.expected = None if eta is None else now + eta
            scheduler.check_deadline(ticket)
            scheduler.add(ticket)
            if place is not None:
                place.ticket = ticket
                self._room.take(place)
            self._changed.notify_all()
            return Accepted(ticket, ticket.position, eta)

    @property
    def stats(self) -> EngineStats:
        """How busy it is; any thread may ask."""
        with self._changed:
            waiting, active, arriving = len(self._scheduler.waiting), len(self._scheduler.active), self._room.arriving
            work, call = self._scheduler.work(), self.current_call
        return EngineStats(waiting, active, work, 0.0 if call is None else call.seconds, arriving, call)

    @property
    def current_call(self) -> ModelCall | None:
        """The call of a model that has taken longest so far, None between two calls. Waits for nothing."""
        return self._in_flight.longest

    def abandon(self, error: ServerError) -> None:
        """Ends every request with `error` although the engine's thread may be inside a call. Nothing can be run afterwards.

        Should that call come back, its thread ends without another. What the requests held of the device's memory is not
        released, as that, too, would be the device's work.
        """
        with self._changed:
            self._in_flight.abandon()
            self._draining = self._stopping = True
            self._abandoned = error
            self._drop_errands()
            tickets = self._scheduler.remove_all()
            self._changed.notify_all()
        for ticket in tickets:
            ticket.end(Failed(copy(error)))  # each its own: one that is raised remembers where, and with that all that was there

    def step(self) -> bool:
        """One round: admit, prepare, choose, denoise, advance, deliver. Returns whether work is left.

        While a device computes a step, the next round begins. So what is chosen in it does not know of what comes meanwhile.
        """
        try:
            self._executor.prepare(self._admit())
            batch = self._choose()
            self._executor.advance(self._executor.run("denoise", batch))
            return self._deliver(self._executor.finish(batch))
        except Abandoned:
            return False

    def _admit(self) -> list[Ticket]:
        """Ends requests that were cancelled or whose deadline has passed, and admits others in their place."""
        with self._changed:
            leaving = self._scheduler.drop(self._clock())
            admitted = self._scheduler.admit(self._clock())
        if leaving:
            self._executor.complete()
        for ticket, error in leaving:
            self._end(ticket, Failed(error))
        return admitted

    def _choose(self) -> list[Ticket]:
        """The requests that share the next call."""
        with self._changed:
            return self._scheduler.next_batch(self._clock())

    def _deliver(self, completed: Sequence[tuple[Ticket, Completed]]) -> bool:
        """Ends the requests that are completed, reports where the others are, and returns whether any are left."""
        for ticket, ending in completed:
            self._leave(ticket, ending)
        with self._changed:
            idle = self._scheduler.idle
        if idle:
            self._executor.complete()
        self._tell_news()
        with self._changed:
            self._changed.notify_all()
            return not self._scheduler.idle

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._run, name="img2img-engine", daemon=True)

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._thread is not threading.current_thread():  # another has taken over
                    return
                self._turns, self._resting = self._turns + 1, True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._stopping or not self._scheduler.idle or self._errands)
                self._resting = False
                if self._stopping:
                    self._drop_errands()
                    self._running = False
                    self._changed.notify_all()
                    return
                errand = self._errands.popleft() if self._errands else None
            try:
                if errand is not None:
                    self._executor.complete()
                    self._run_errand(*errand)
                self.step()
            except Exception:  # noqa: BLE001 - a bug of ours must not leave callers waiting for ever
                _log.exception("the engine's step failed")
                self._executor.forget()
                self._end_all(ModelFailed("the server failed"))

    def _run_errand(self, model: str, work: Callable[[], _R], done: "Future[_R]") -> None:
        with self._in_flight.call("warm-up", model):
            try:
                done.set_result(work())
            except BaseException as error:  # noqa: BLE001 - it is raised where the work is waited for
                done.set_exception(error)

    def _drop_errands(self) -> None:
        while self._errands:
            self._errands.popleft()[2].set_exception(ShuttingDown("the server is shutting down"))

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
            if not self._scheduler.leave(ticket):  # abandoned meanwhile
                return
            if isinstance(ending, Completed):
                self._scheduler.learn(ticket, self._clock() - ticket.arrival)
        self._end(ticket, ending)

    def _end(self, ticket: Ticket, ending: Ending) -> None:
        """Releases a request that is leaving and delivers its ending, unless abandon() delivers another."""
        with self._changed:
            state, ticket.state = ticket.state, None
        if state is not None and self._abandoned is None:
            model = ticket.request.model
            try:
                with self._in_flight.call("release", model, 1, ticket.plan.rows):
                    self._pipelines[model].release(state)
            except Exception:  # noqa: BLE001 - the request's own ending counts more
                _log.exception("model '%s' failed to release a request", model)
        with self._changed:
            removed = self._scheduler.remove(ticket)
            self._changed.notify_all()
        if removed:
            ticket.end(ending)

    def _end_all(self, error: ServerError) -> None:
        with self._changed:
            tickets = self._scheduler.tickets
            for ticket in tickets:
                self._scheduler.leave(ticket)
        for ticket in tickets:
            self._end(ticket, Failed(copy(error)))

    def _check_open(self) -> None:
        if self._abandoned is not None:
            raise copy(self._abandoned)
        if self._draining:
            raise ShuttingDown("the server is shutting down")

    def _pipeline(self, model: str) -> Pipeline:
        if model not in self._pipelines:
            raise ModelNotLoaded(f"model '{model}' is not in memory any more")
        return self._pipelines[model]

"""The engine: one thread that owns the device and advances the requests of all models step by step."""

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

_R = TypeVar("_R")


class Engine:
    """Runs requests of several models with step-level continuous batching.

    Every accepted request ends exactly once: its listener is called with Completed or Failed, on the engine's thread, or on the
    thread that calls close() or abandon(). Tests do not call start(), and call step() themselves. `clock` is monotonic, in
    seconds. `observe` is called with every stage that ran.
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
        self._admission = Admission(self._scheduler)
        self._numbers = itertools.count(1)
        self._rounds, self._between_rounds = 0, True  # rounds of the thread, and whether it is between two of them
        self._thread = self._new_thread()
        self._tasks: deque[tuple[str, Callable[[], Any], Future[Any]]] = deque()
        self._running = False
        self._draining = False
        self._stopping = False
        self._abandoned: ServerError | None = None

    @property
    def clock(self) -> Callable[[], float]:
        """The monotonic clock of deadlines, in seconds."""
        return self._clock

    def start(self) -> None:
        """Starts the engine's thread."""
        with self._changed:
            if not self._running:
                self._running = True
                self._thread.start()

    def call(self, model: str, work: Callable[[], _R]) -> _R:
        """Runs `work` on the engine's thread between two rounds, and returns its result or raises its error. Starts the thread if
        needed.

        Warm-up of `model` runs here, because CUDA graphs must be recorded on that thread. Raises ShuttingDown if the engine stops
        before `work` began.
        """
        done: Future[_R] = Future()
        with self._changed:
            if self._stopping:
                raise ShuttingDown("the server is shutting down")
            self._tasks.append((model, work, done))
            self._changed.notify_all()
            self.start()
        return done.result()

    def restart_thread(self) -> None:
        """Starts another engine thread, because the current one does not return from a call. Only before requests are
        accepted."""
        with self._changed:
            self._in_flight.forget(self._thread)
            self._thread = self._new_thread()
            self._thread.start()

    def replace(self, model: str, pipeline: Pipeline) -> None:
        """Runs `model` with `pipeline` from its next call on, requests in progress included. Adds `model` if it is new.

        The new pipeline continues the states of the old one, so it must be of the same class, over the same components.
        """
        with self._changed:
            self._pipelines[model] = pipeline
            self._scheduler.set_max_rows(model, pipeline.max_rows)
            self.costs.pad(model, pipeline.row_buckets)

    def adopt(self, model: str, measured: Measured) -> None:
        """Sets the measured costs of `model`, unless newer ones have been learnt from its calls."""
        with self._changed:
            if not self.costs.knows(model):
                self.costs.adopt(model, measured)

    def wait_until_idle(self, model: str) -> bool:
        """Waits until no request of `model` is left, nor a reference to one. Returns False if the engine stops before."""
        with self._changed:
            self._changed.wait_for(lambda: not self._scheduler.has(model) or self._stopping)
            round_number = self._rounds  # the step that ended the last request may still refer to it
            self._changed.wait_for(lambda: self._between_rounds or self._rounds != round_number or self._stopping)
            return not self._scheduler.has(model) and self._abandoned is None

    def remove(self, model: str) -> None:
        """Removes `model`, which must have no requests left."""
        with self._changed:
            assert not self._scheduler.has(model), f"{model} has requests"
            del self._pipelines[model]

    def drain(self, timeout: float | None = None) -> bool:
        """Refuses new requests and waits until the accepted ones have ended. Returns False after `timeout` seconds."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: self._scheduler.empty, timeout)

    def close(self) -> None:
        """Stops after the current step, or at once if the engine was abandoned. Requests that have not ended then end with
        ShuttingDown."""
        with self._changed:
            self._draining = self._stopping = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._running or self._abandoned is not None)
        self._end_all(ShuttingDown("the server stopped before the request was finished"))

    @contextmanager
    def reserve(self, client: str = "") -> Iterator[Slot]:
        """Reserves a slot in the queue for a request of `client` whose image is still being read.

        The request counts as waiting until it is submitted, and against its client's limit until the block ends. Raises what
        `submit` raises for any request of that client, so that a refused request costs no decoding.
        """
        slot = Slot(client)
        with self._changed:
            self._check_open()
            self._admission.check(client, self._clock())
            self._admission.take(slot)
        try:
            yield slot
        finally:
            with self._changed:
                self._admission.leave(slot)

    def submit(self, request: Request, listener: Listener, slot: Slot | None = None, bounded: bool = True) -> Accepted:
        """Accepts a request from any thread; its events go to `listener` on the engine's thread, which must not block.

        `slot` is the one from `reserve`, if any. A request that is not `bounded` is the server's own, and not subject to the
        queue's limits, since waiting requests may depend on it. Raises InvalidField, QueueFull, ClientBusy, ModelNotLoaded,
        ShuttingDown, the error the engine was abandoned with, or DeadlineUnmeetable if the request is forecast to end after its
        deadline.
        """
        with self._in_flight.call("plan", request.model):
            plan = self._pipeline(request.model).plan(request)
        with self._changed:
            if slot is not None:
                self._admission.leave(slot)
            self._check_open()
            self._pipeline(request.model)
            now, scheduler = self._clock(), self._scheduler
            if bounded:
                self._admission.check(request.client, now, request.background)
            ticket = Ticket(request, plan, listener, next(self._numbers), now, cancellations=scheduler.cancelled)
            scheduler.add(ticket, now)
            if slot is not None:
                slot.ticket = ticket
                self._admission.take(slot)
            self._changed.notify_all()
            return Accepted(ticket, ticket.position, None if ticket.expected is None else ticket.expected - now)

    @property
    def stats(self) -> EngineStats:
        """How busy the engine is. Thread-safe."""
        with self._changed:
            waiting, active, arriving = len(self._scheduler.waiting), len(self._scheduler.active), self._admission.arriving
            work, call = self._scheduler.work(), self.current_call
        return EngineStats(waiting, active, work, 0.0 if call is None else call.seconds, arriving, call)

    @property
    def current_call(self) -> ModelCall | None:
        """The longest call of a model in flight, None between two calls. Never blocks."""
        return self._in_flight.longest

    def abandon(self, error: ServerError) -> None:
        """Ends every request with `error`, even if the engine's thread is inside a call. The engine is unusable afterwards.

        If that call returns, the thread exits without making another. The requests' device memory is not released, because that
        needs the device, too.
        """
        with self._changed:
            self._in_flight.abandon()
            self._draining = self._stopping = True
            self._abandoned = error
            self._cancel_tasks()
            tickets = self._scheduler.remove_all()
            self._changed.notify_all()
        for ticket in tickets:
            ticket.end(Failed(copy(error)))  # a copy each: a raised error keeps its traceback, and so all frames, alive

    def step(self) -> bool:
        """One round: admit, prepare, choose, denoise, advance, deliver. Returns whether work is left.

        The next round begins while the device computes this one's step, so it does not see requests that arrive in between.
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
        """Ends completed requests and reports the positions of waiting ones. Returns whether any requests are left."""
        for ticket, ending in completed:
            self._leave(ticket, ending)
        with self._changed:
            idle = self._scheduler.idle
        if idle:
            self._executor.complete()
        self._publish_positions()
        with self._changed:
            self._changed.notify_all()
            return not self._scheduler.idle

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._run, name="img2img-engine", daemon=True)

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._thread is not threading.current_thread():  # restart_thread() started another
                    return
                self._rounds, self._between_rounds = self._rounds + 1, True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._stopping or not self._scheduler.idle or self._tasks)
                self._between_rounds = False
                if self._stopping:
                    self._cancel_tasks()
                    self._running = False
                    self._changed.notify_all()
                    return
                task = self._tasks.popleft() if self._tasks else None
            try:
                if task is not None:
                    self._executor.complete()
                    self._run_task(*task)
                self.step()
            except Exception:  # noqa: BLE001 - callers must get an ending even after a bug in the engine
                _log.exception("the engine's step failed")
                self._executor.forget()
                self._end_all(ModelFailed("the server failed"))

    def _run_task(self, model: str, work: Callable[[], _R], done: "Future[_R]") -> None:
        with self._in_flight.call("warm-up", model):
            try:
                done.set_result(work())
            except BaseException as error:  # noqa: BLE001 - call() raises it
                done.set_exception(error)

    def _cancel_tasks(self) -> None:
        while self._tasks:
            self._tasks.popleft()[2].set_exception(ShuttingDown("the server is shutting down"))

    def _publish_positions(self) -> None:
        """Updates forecasts, and notifies waiting requests whose position has changed: a few at a time."""
        now = self._clock()
        with self._changed:
            moved = self._scheduler.update_forecasts(now)
        for ticket in moved:
            ticket.notify(Queued(ticket.position, None if ticket.expected is None else max(0.0, ticket.expected - now)))

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
            except Exception:  # noqa: BLE001 - a failing release must not replace the request's ending
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
            raise ModelNotLoaded(f"model '{model}' is no longer in memory: send the request again")
        return self._pipelines[model]

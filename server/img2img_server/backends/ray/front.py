"""The front's engine interface: accepts requests and runs each on a replica, until it ends exactly once.

If a replica is lost, its requests run again on another one and produce the same images, because their seeds are chosen here. The
front applies the queue limits before an image is decoded; each replica's engine applies them again.
"""

import asyncio
import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from copy import copy
from dataclasses import dataclass

from img2img_server.backends.ray.messages import (
    RemoteRequest,
    ReplicaLeft,
    ReplicaLost,
    Replicas,
    check_lost,
)
from img2img_server.backends.ray.roster import PATIENCE, POLL_INTERVAL, RETRY_AFTER, Roster, plan
from img2img_server.engine.admission import Slot
from img2img_server.engine.interface import Accepted, EngineStats
from img2img_server.engine.request import Completed, Ending, Failed, Listener, Progress, Queued, Request, Started, Ticket
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.errors import (
    ClientBusy,
    DeadlineExpired,
    ModelFailed,
    NoReplica,
    QueueFull,
    RequestCancelled,
    ServerError,
    ShuttingDown,
)

_log = logging.getLogger(__name__)

_TRIES = 6
"""Maximum times that a request is sent, each time after the previous replica has left or was lost."""
_DEATHS = 3
"""Lost replicas after which their common request counts as the cause, and fails."""
_PAUSE = 0.1
"""Seconds before the third try, doubled before each further one, so that the cluster can recover."""
_MIN_RETRY = 0.1
"""The shortest retry delay in seconds."""


@dataclass(slots=True, eq=False)
class _RemoteTicket(Ticket):
    """A request that runs on replicas. Events that a lost replica has sent are not repeated by the next one."""

    task: "asyncio.Task[Ending] | None" = None
    was_started: bool = False
    step: int = 0
    error: ServerError | None = None
    """The error to end with if the front cancels it, None if its caller does."""

    def cancel(self) -> None:
        """Cancels the replica's call. Idempotent. Called on the event loop only."""
        self.cancelled = True
        if self.task is not None:
            self.task.cancel()

    def forward(self, event: Queued | Started | Progress) -> None:
        """Notifies the listener of an event unless it is a repetition."""
        if isinstance(event, Progress):
            if event.step > self.step:
                self.step = event.step
                self.notify(event)
        elif isinstance(event, Started):
            if not self.was_started:
                self.was_started = True
                self.notify(event)
        elif not self.was_started:
            self.position = event.position
            self.notify(event)

    def finish(self, ending: Ending, now: float) -> None:
        """Delivers the ending, and derives the start times of its stages from its timings."""
        if isinstance(ending, Completed):
            timings = ending.timings
            self.prepared = now - timings.decode - timings.denoise
            self.started = self.prepared - timings.encode
        self.end(ending)


class Front:
    """Accepts requests for the replicas of `roster`. Each ends exactly once. Used on the event loop only, except `stats`. `clock`
    is monotonic, in seconds."""

    def __init__(
        self, replicas: Replicas, roster: Roster, limits: QueueLimits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._replicas = replicas
        self._roster = roster
        self._limits = limits
        self._clock = clock
        self._numbers = itertools.count(1)
        self._slots: set[Slot] = set()
        self._running: set[_RemoteTicket] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._refusal: ServerError | None = None

    @property
    def clock(self) -> Callable[[], float]:
        """The monotonic clock of deadlines, in seconds."""
        return self._clock

    @property
    def stats(self) -> EngineStats:
        """The total load of all replicas."""
        loads = self._roster.loads
        known = [load.seconds for load in loads if load.seconds is not None]
        return EngineStats(
            waiting=sum(load.waiting for load in loads),
            active=sum(load.active for load in loads),
            work_seconds=sum(known) if known else None,
            call_seconds=0.0,
            arriving=sum(slot.ticket is None for slot in tuple(self._slots)),
        )

    @contextmanager
    def reserve(self, client: str = "") -> Iterator[Slot]:
        """Reserves a slot for a request of `client`, which counts against its client's limit until the block ends. Raises
        ShuttingDown, NoReplica, QueueFull or ClientBusy."""
        self._check(client)
        slot = Slot(client)
        self._slots.add(slot)
        try:
            yield slot
        finally:
            self._slots.discard(slot)

    def submit(self, request: Request, listener: Listener, slot: Slot | None = None) -> Accepted:
        """Sends a request to a replica. The returned position is an estimate; if the request is followed, its replica's position
        is sent as an event. Raises the errors of `reserve`, and DeadlineExpired."""
        if slot is not None:
            self._slots.discard(slot)
        self._check(request.client)
        now = self._clock()
        if request.deadline is not None and request.deadline <= now:
            raise DeadlineExpired("the deadline passed before the request was read")
        ticket = _RemoteTicket(request, plan(request), listener, next(self._numbers), now)
        ticket.position = min((load.waiting for load in self._roster.loads), default=0)
        if slot is not None:
            slot.ticket = ticket
            self._slots.add(slot)
        self._running.add(ticket)
        self._idle.clear()
        ticket.task = asyncio.create_task(self._run(ticket))
        # Not within the task, which may be cancelled before its first step.
        ticket.task.add_done_callback(functools.partial(self._ended, ticket))
        return Accepted(ticket, ticket.position, None)

    async def drain(self, seconds: float) -> bool:
        """Refuses new requests and waits until the accepted ones have ended. Returns False after `seconds`."""
        self._refusal = self._refusal or ShuttingDown("the server is shutting down")
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def abandon(self, error: ServerError) -> None:
        """Ends every request with `error` and refuses new ones."""
        self._refusal = error
        self.end_all(error)
        await self._idle.wait()

    def end_all(self, error: ServerError) -> None:
        """Ends every request with `error`."""
        for ticket in self._running:
            ticket.error = copy(error)  # a copy each: a raised error keeps its traceback
            ticket.cancel()

    def check_replicas(self) -> None:
        """Called after each poll: ends all requests if there has been no replica for too long."""
        if not self._roster.loads and self._clock() - self._roster.polled > PATIENCE:
            self.end_all(NoReplica("no replica can be reached", RETRY_AFTER))

    def _ended(self, ticket: _RemoteTicket, task: "asyncio.Task[Ending]") -> None:
        """Delivers a request's ending when its task has ended."""
        self._running.discard(ticket)
        if not self._running:
            self._idle.set()
        if task.cancelled():
            ending: Ending = Failed(ticket.error or RequestCancelled("the caller cancelled the request"))
        elif (error := task.exception()) is not None:  # a bug of the replica or the front
            _log.error("a request failed", exc_info=error, extra={"request_id": ticket.request.id})
            ending = Failed(ModelFailed("the server failed"))
        else:
            ending = task.result()
        ticket.finish(ending, self._clock())

    async def _run(self, ticket: _RemoteTicket) -> Ending:
        """Runs a request, and again if its replica is lost, until it ends."""
        request, deaths = ticket.request, 0
        for attempt in range(_TRIES):
            if attempt > 1:
                await asyncio.sleep(_PAUSE * 2 ** (attempt - 2))
            job = RemoteRequest.of(request, self._clock())
            if job.seconds_left is not None and job.seconds_left <= 0:
                return Failed(DeadlineExpired("the deadline passed before the request was finished"))
            try:
                return await self._attempt(ticket, job)
            except ReplicaLost as error:
                _log.warning("lost a replica: %s", error, extra={"request_id": request.id})
                deaths += not isinstance(error, ReplicaLeft)
                if deaths == _DEATHS:  # not UNAVAILABLE, which clients would retry again and again
                    return Failed(ModelFailed(f"{deaths} replicas were lost, one after the other, while they had this request"))
        return Failed(NoReplica("no replica stayed long enough for this request", RETRY_AFTER))

    async def _attempt(self, ticket: _RemoteTicket, job: RemoteRequest) -> Ending:
        if not ticket.request.follow:
            return check_lost(await self._replicas.transform(job))
        async with aclosing(self._replicas.stream(job)) as events:
            async for event in events:
                if isinstance(event, Completed | Failed):
                    return check_lost(event)
                ticket.forward(event)
        raise ReplicaLost("the stream ended before the request did")

    def _check(self, client: str) -> None:
        """Raises the error that refuses another request of `client`, if any."""
        if self._refusal is not None:
            raise copy(self._refusal)
        loads, limits = self._roster.loads, self._limits
        if not loads:
            raise NoReplica("no replica can be reached", RETRY_AFTER)
        waiting, held = self._waiting(), self._held(client) if client else 0
        if waiting >= limits.waiting_slots(held, len(loads)):
            raise QueueFull(f"the queue is full: {waiting} requests are waiting", _MIN_RETRY + POLL_INTERVAL)
        work = min(0.0 if load.seconds is None else load.seconds for load in loads)
        most = limits.max_waiting_seconds
        if most is not None and work > most:
            message = f"the accepted work takes about {work:.1f} s, the maximum is {most:g} s"
            raise QueueFull(message, max(_MIN_RETRY, work - most))
        if held >= limits.max_client_waiting:
            message = f"this client has {held} unfinished requests, the maximum is {limits.max_client_waiting}"
            raise ClientBusy(message, _MIN_RETRY + POLL_INTERVAL)

    def _waiting(self) -> int:
        """The number of waiting requests: those reported by replicas, arriving ones, and those sent since the last poll beyond
        the free capacity."""
        loads = self._roster.loads
        sent = sum(ticket.arrival >= self._roster.polled for ticket in self._running)
        free = sum(max(0, self._limits.max_active - load.active - load.waiting) for load in loads)
        arriving = sum(slot.ticket is None for slot in self._slots)
        return sum(load.waiting for load in loads) + arriving + max(0, sent - free)

    def _held(self, client: str) -> int:
        """A client's unfinished requests, and those whose responses it has not read yet."""
        running = sum(ticket.request.client == client for ticket in self._running)
        elsewhere = (slot for slot in self._slots if slot.ticket is None or slot.ticket.ended)
        return running + sum(slot.client == client for slot in elsewhere)

"""The front's runner: takes requests as an engine does, and sees each through to its one ending on some replica.

A replica that is lost takes nothing with it: its requests, whose seeds were drawn here, run again on another, and give the same
images. Here too are the bounds that hold before an image is decoded; each replica's own engine holds them again.
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
    RemoteCompleted,
    RemoteProgress,
    RemoteRequest,
    ReplicaLeft,
    ReplicaLost,
    Replicas,
    Told,
    ending_of,
)
from img2img_server.backends.ray.roster import COME_BACK, LOOK_EVERY, Roster, plan
from img2img_server.engine.admission import Slot
from img2img_server.engine.interface import Accepted, EngineStats
from img2img_server.engine.request import Completed, Ending, Failed, Listener, Queued, Request, Started, Ticket
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
"""Times that a request is sent, each time to another replica as the one before left or was lost."""
_DEATHS = 3
"""Replicas that are lost while they have a request until it counts as what ends them, and is sent to no other."""
_PAUSE = 0.1
"""Seconds before the third try, twice as many before each that follows: a cluster that loses that many needs a moment."""
_PATIENCE = 60.0
"""Seconds that accepted requests wait for a replica where none is left. Another takes a while to load its models."""
_SOONEST = 0.1
"""Seconds after which a refused request may come back, at the least."""


@dataclass(slots=True, eq=False)
class _Passage(Ticket):
    """A request on its way through replicas. What one told before it was lost is not told again by the next."""

    task: "asyncio.Task[Ending] | None" = None
    was_started: bool = False
    step: int = 0
    verdict: ServerError | None = None
    """What it is to end with, where it is not its caller who ends it."""

    def cancel(self) -> None:
        """Gives up: the call of the replica is cancelled. On the event loop only; harmless on one that has ended."""
        self.cancelled = True
        if self.task is not None:
            self.task.cancel()

    def pass_on(self, told: Told) -> None:
        """Tells the listener what is new to it."""
        if isinstance(told, RemoteProgress):
            if told.step > self.step:
                self.step = told.step
                self.notify(told.progress())
        elif isinstance(told, Started):
            if not self.was_started:
                self.was_started = True
                self.notify(told)
        elif isinstance(told, Queued) and not self.was_started:
            self.position = told.position
            self.notify(told)

    def ended_by(self, ending: Ending, now: float) -> None:
        """Delivers the ending, with the times at which its stages must have begun."""
        if isinstance(ending, Completed):
            timings = ending.timings
            self.prepared = now - timings.decode - timings.denoise
            self.started = self.prepared - timings.encode
        self.end(ending)


class Front:
    """Takes requests for the replicas that `roster` looks at. Every accepted one ends exactly once. Used on the event loop only,
    but for `stats`. `clock` gives seconds and never goes back."""

    def __init__(
        self, replicas: Replicas, roster: Roster, limits: QueueLimits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._replicas = replicas
        self._roster = roster
        self._limits = limits
        self._clock = clock
        self._numbers = itertools.count(1)
        self._slots: set[Slot] = set()
        self._running: set[_Passage] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._refusal: ServerError | None = None

    @property
    def clock(self) -> Callable[[], float]:
        """What deadlines are measured on."""
        return self._clock

    @property
    def stats(self) -> EngineStats:
        """How busy the replicas are, together."""
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
        """Reserves a slot for a request of `client`, which counts against its client's limit until the block ends. Raises if
        there is none: ShuttingDown, NoReplica, QueueFull or ClientBusy."""
        self._check(client)
        slot = Slot(client)
        self._slots.add(slot)
        try:
            yield slot
        finally:
            self._slots.discard(slot)

    def submit(self, request: Request, listener: Listener, slot: Slot | None = None) -> Accepted:
        """Sends a request to a replica. The position in the answer is the front's estimate; the replica's own
        follows if the request is followed. Raises what `reserve` raises, and DeadlineExpired."""
        if slot is not None:
            self._slots.discard(slot)
        self._check(request.client)
        now = self._clock()
        job = RemoteRequest.of(request, now)
        if job.seconds_left is not None and job.seconds_left <= 0:
            raise DeadlineExpired("the deadline passed before the request was read")
        passage = _Passage(request, plan(request), listener, next(self._numbers), now)
        passage.position = min((load.waiting for load in self._roster.loads), default=0)
        if slot is not None:
            slot.ticket = passage
            self._slots.add(slot)
        self._running.add(passage)
        self._idle.clear()
        passage.task = asyncio.create_task(self._persist(passage, job))
        # Not within the task: one that is cancelled before its first step would not tell of it.
        passage.task.add_done_callback(functools.partial(self._ended, passage))
        return Accepted(passage, passage.position, None)

    async def drain(self, seconds: float) -> bool:
        """Takes no new requests and waits until the accepted ones have ended. False where `seconds` were too few."""
        self._refusal = self._refusal or ShuttingDown("the server is shutting down")
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def abandon(self, error: ServerError) -> None:
        """Ends every request with `error`, and takes no more."""
        self._refusal = error
        self.end_all(error)
        await self._idle.wait()

    def end_all(self, error: ServerError) -> None:
        """Ends every request with `error`."""
        for passage in self._running:
            passage.verdict = copy(error)  # each its own: one that is raised remembers where
            passage.cancel()

    def looked(self) -> None:
        """The roster has looked. Those who wait for a replica that never comes are told."""
        if not self._roster.loads and self._clock() - self._roster.looked > _PATIENCE:
            self.end_all(NoReplica("no replica can be reached", COME_BACK))

    def _ended(self, passage: _Passage, task: "asyncio.Task[Ending]") -> None:
        """The task of a request is over, one way or another."""
        self._running.discard(passage)
        if not self._running:
            self._idle.set()
        if task.cancelled():
            ending: Ending = Failed(passage.verdict or RequestCancelled("the caller cancelled the request"))
        elif (error := task.exception()) is not None:  # a fault of a replica's, or ours
            _log.error("a request could not be run", exc_info=error, extra={"request_id": passage.request.id})
            ending = Failed(ModelFailed("the server failed"))
        else:
            ending = task.result()
        passage.ended_by(ending, self._clock())

    async def _persist(self, passage: _Passage, job: RemoteRequest) -> Ending:
        """Has the request run, again where a replica is lost, until it ends."""
        deadline, deaths = passage.request.deadline, 0
        for attempt in range(_TRIES):
            if attempt > 1:
                await asyncio.sleep(_PAUSE * 2 ** (attempt - 2))
            left = None if deadline is None else deadline - self._clock()
            if left is not None and left <= 0:
                return Failed(DeadlineExpired("the deadline passed before the request was finished"))
            try:
                return await self._attempt(passage, job.at(left))
            except ReplicaLost as error:
                _log.warning("a replica was lost: %s", error, extra={"request_id": job.id})
                deaths += not isinstance(error, ReplicaLeft)
                if deaths == _DEATHS:  # not UNAVAILABLE: clients would send it again, and again
                    return Failed(ModelFailed(f"{deaths} replicas were lost, one after the other, while they had this request"))
        return Failed(NoReplica("no replica stayed long enough for this request", COME_BACK))

    async def _attempt(self, passage: _Passage, job: RemoteRequest) -> Ending:
        if not job.follow:
            return ending_of(await self._replicas.transform(job))
        async with aclosing(self._replicas.stream(job)) as events:
            async for told in events:
                if isinstance(told, RemoteCompleted | Failed):
                    return ending_of(told)
                passage.pass_on(told)
        raise ReplicaLost("the stream ended before the request did")

    def _check(self, client: str) -> None:
        """Raises where one more request of `client` is not to be taken."""
        if self._refusal is not None:
            raise copy(self._refusal)
        loads, limits = self._roster.loads, self._limits
        if not loads:
            raise NoReplica("no replica can be reached", COME_BACK)
        waiting, held = self._waiting(), self._held(client) if client else 0
        if waiting >= limits.waiting_slots(held, len(loads)):
            raise QueueFull(f"{waiting} requests are waiting already", _SOONEST + LOOK_EVERY)
        seconds = [0.0 if load.seconds is None else load.seconds for load in loads]
        most = limits.max_waiting_seconds
        if most is not None and min(seconds) > most:
            message = f"there are about {min(seconds):.1f} s of work already, the most is {most:g} s"
            raise QueueFull(message, max(_SOONEST, min(seconds) - most))
        if held >= limits.max_client_waiting:
            message = f"{held} requests of yours have not ended, the most is {limits.max_client_waiting}"
            raise ClientBusy(message, _SOONEST + LOOK_EVERY)

    def _waiting(self) -> int:
        """Requests that wait: those that the replicas told of, those that arrive, and those that were sent since, as far as no
        engine has room for them at once."""
        loads = self._roster.loads
        sent = sum(passage.arrival >= self._roster.looked for passage in self._running)
        room = sum(max(0, self._limits.max_active - load.active - load.waiting) for load in loads)
        arriving = sum(slot.ticket is None for slot in self._slots)
        return sum(load.waiting for load in loads) + arriving + max(0, sent - room)

    def _held(self, client: str) -> int:
        """Requests of a client's that have not ended, and those whose answers are still on their way to it."""
        running = sum(passage.request.client == client for passage in self._running)
        elsewhere = (slot for slot in self._slots if slot.ticket is None or slot.ticket.ended)
        return running + sum(slot.client == client for slot in elsewhere)

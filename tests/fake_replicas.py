"""Scripted replicas, and a front over them whose roster polls only when a test asks it to."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fakes import Clock, FakePipeline, make_request
from img2img_server.backends.ray.front import Front
from img2img_server.backends.ray.messages import (
    Card,
    Load,
    Look,
    ModelQuery,
    NoResponse,
    RemoteRequest,
    ReplicaLost,
)
from img2img_server.backends.ray.roster import RemoteModels, Roster
from img2img_server.engine.admission import Slot
from img2img_server.engine.request import Completed, Ending, Event, Failed, Timings
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.errors import (
    ServerError,
)
from running import store

CARD = Card.of(store(m=FakePipeline()).get("m"))
IDLE = Load(0.0, 0, 0, ("m",))
LOST = ReplicaLost("killed")
Script = Sequence[Event | Exception | asyncio.Event]
"""A replica's actions in one call: it sends events, raises, or waits."""


def done(job: RemoteRequest) -> Completed:
    return Completed((job.request.image,), Timings(0.1, 0.2, 0.3, 0.4))


class FakeReplicas:
    """Replicas whose calls follow `scripts`, one each; a call without a script completes. `jobs` are the received calls,
    `cancelled` the cancelled ones, and `looks` the reports by replica name, returned after `late` unanswered polls. Replicas in
    `slow` do not answer in time."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.jobs: list[RemoteRequest] = []
        self.cancelled: list[RemoteRequest] = []
        self.late = 0
        self.slow: set[str] = set()
        self.came = asyncio.Event()
        self.looks = {"r0": Look("r0", IDLE, (CARD,), None), "r1": Look("r1", IDLE, (CARD,), None)}
        self.answers: defaultdict[str, list[Any]] = defaultdict(list)
        self.asked: list[tuple[str, Any]] = []
        self.before: Callable[[], Awaitable[object]] | None = None

    async def transform(self, job: RemoteRequest) -> Ending:
        async for event in self.stream(job):
            if isinstance(event, Completed | Failed):
                return event
        raise AssertionError("a script has an end")

    async def stream(self, job: RemoteRequest) -> AsyncGenerator[Event, None]:
        self.jobs.append(job)
        self.came.set()
        script = self.scripts.pop(0) if self.scripts else (done(job),)
        try:
            if self.before is not None:
                await self.before()
            for act in script:
                if isinstance(act, asyncio.Event):
                    await act.wait()
                elif isinstance(act, Exception):
                    raise act
                else:
                    yield done(job) if isinstance(act, Completed) else act
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(job)
            raise

    async def ask(self, method: str, asked: ModelQuery) -> Card | Failed:
        self.asked.append((method, asked))
        answer = self.answers[method].pop(0)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Card | Failed)
        return answer

    async def everywhere(self, method: str, *arguments: Any) -> Sequence[Any]:
        if method == "look":
            self.late -= 1
            if not self.looks or self.late >= 0:
                raise LOST
            return [NoResponse() if name in self.slow else look for name, look in self.looks.items()]
        self.asked.append((method, *arguments))
        return self.answers[f"all {method}"].pop(0)  # type: ignore[no-any-return]


class Rig:
    """A front over such replicas, whose roster polls on demand."""

    def __init__(self, replicas: FakeReplicas, limits: QueueLimits) -> None:
        self.replicas, self.clock = replicas, Clock()
        self.serving: dict[str, bool] = {}
        self.roster = Roster(replicas, self._tell, self.clock)
        self.front = Front(replicas, self.roster, limits, self.clock)
        self.models = RemoteModels(replicas, self.roster)

    async def run(self, **settings: object) -> list[Event]:
        """All events of one request."""
        return await self.submit(**settings).over()

    def submit(self, **settings: object) -> "Caller":
        return Caller(self.front, None, **settings)

    def _tell(self, name: str, serving: bool) -> None:
        self.serving[name] = serving


class Caller:
    """Submits a request and receives its events."""

    def __init__(self, front: Front, place: Slot | None = None, **settings: object) -> None:
        self.events: list[Event] = []
        self._ended = asyncio.Event()
        self.accepted = front.submit(make_request(**settings), self._listen, place)

    async def over(self) -> list[Event]:
        await self._ended.wait()
        await asyncio.sleep(0)  # a second ending would come now
        assert sum(isinstance(event, Completed | Failed) for event in self.events) == 1
        assert isinstance(self.events[-1], Completed | Failed)
        return self.events

    async def error(self) -> ServerError:
        ending = (await self.over())[-1]
        assert isinstance(ending, Failed)
        return ending.error

    def _listen(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Completed | Failed):
            self._ended.set()


@asynccontextmanager
async def rig(*scripts: Script, **limits: Any) -> AsyncIterator[Rig]:
    made = Rig(FakeReplicas(*scripts), QueueLimits(**limits))
    await made.roster.open(None)
    yield made
    assert await made.front.drain(60)


def loads(it: Rig, *given: Load) -> None:
    """Sets the replicas' loads from the next poll on."""
    it.replicas.looks = {f"r{n}": Look(f"r{n}", load, (CARD,), None) for n, load in enumerate(given)}

"""One engine of a cluster: what the local server has behind its gRPC front, asked by messages.

Nothing here knows of Ray, which makes an actor of it (deployment.py). All methods are called on one event loop, which they never
block. Errors that are meant for callers are answers (Failed), not exceptions.
"""

import asyncio
import logging
import math
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from img2img_server.backends.base import LocalBackend
from img2img_server.backends.local import local
from img2img_server.backends.ray.messages import (
    Card,
    Ended,
    LoadModel,
    Look,
    ModelAnswer,
    RemoteCompleted,
    RemoteProgress,
    RemoteRequest,
    Told,
    Unloaded,
)
from img2img_server.bundle.manifest import Source
from img2img_server.config import ServerConfig
from img2img_server.engine.interface import ignore
from img2img_server.engine.request import Completed, Event, Failed, Progress, Queued
from img2img_server.errors import EngineStuck, ServerError
from img2img_server.models.registry import ModelState
from img2img_server.support.call import Call, answering

_log = logging.getLogger(__name__)


class Replica:
    """Runs requests by the engine that `make` gives, with models that are loaded, kept and unloaded as a local server's are.

    `open` loads and measures them, and has to be done before anything else; `close` finishes what runs.
    """

    def __init__(self, config: ServerConfig, make: Callable[[ServerConfig], LocalBackend] = local) -> None:
        self._config = config
        self._backend = make(config)
        self._name = uuid.uuid4().hex
        self._stuck = ""

    async def open(self) -> None:
        """Loads and measures the models, and starts the engine. Raises BundleError, OSError or ValueError where it cannot."""
        await self._backend.open(_nobody, ignore)
        await self._backend.start(self._give_up)

    async def close(self) -> None:
        """Takes no new requests, gives those that run the grace period, and lets go of everything."""
        if not self._stuck:
            await self._backend.drain(self._config.grace)
        await self._backend.close()

    async def transform(self, job: RemoteRequest) -> Ended:
        """Runs one request to its end. Cancelling the call cancels the request."""
        async with aclosing(self._run(job)) as events:
            async for event in events:
                if isinstance(event, RemoteCompleted | Failed):
                    return event
        raise AssertionError("the engine ends every request")

    async def stream(self, job: RemoteRequest) -> AsyncGenerator[Told, None]:
        """Runs one request and tells each of its events. Closing the generator cancels the request."""
        async with aclosing(self._run(job)) as events:
            async for event in events:
                yield event

    async def bring(self, asked: ModelAnswer) -> Card | Failed:
        """Has the model that a request means in memory, as far as requests may load models, and returns its card."""
        with answering(asked.call):
            try:
                async with self._backend.residency.using(asked.reference) as model:
                    return Card.of(model)
            except ServerError as error:
                return Failed(error)

    async def load(self, asked: ModelAnswer) -> Card | Failed:
        """Makes a model ready, and returns its card."""
        with answering(asked.call):
            try:
                return Card.of(await self._backend.residency.load(asked.reference))
            except ServerError as error:
                return Failed(error)

    async def unload(self, asked: ModelAnswer) -> Unloaded | Failed:
        """Frees a model's memory once nobody uses it."""
        with answering(asked.call):
            try:
                return Unloaded(await self._backend.residency.unload(asked.name))
            except ServerError as error:
                return Failed(error)

    async def look(self) -> Look:
        """Which models there are, and how busy it is."""
        models = self._backend.models
        return Look(self._name, self.load_now(), tuple(Card.of(model) for model in models), models.default)

    def load_now(self) -> LoadModel:
        """How busy it is. Quick, and on any thread. One that is stuck is busy for ever."""
        if self._stuck:
            return LoadModel(math.inf, 0, 0, ())
        stats = self._backend.runner.stats
        resident = tuple(model.id for model in self._backend.models if model.state is ModelState.READY)
        return LoadModel(stats.work_seconds, stats.waiting + stats.arriving, stats.active, resident)

    def loading(self) -> tuple[str, ...]:
        """The ids of the models that are on their way into its memory."""
        return tuple(model.id for model in self._backend.models if model.state is ModelState.LOADING)

    def check_health(self) -> None:
        """Raises EngineStuck once the device has not come back from a call: only the process's end can cure that."""
        if self._stuck:
            raise EngineStuck(self._stuck)

    async def _run(self, job: RemoteRequest) -> AsyncGenerator[Told, None]:
        """The events of a request, its end among them."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event] = asyncio.Queue()

        def listen(event: Event) -> None:
            if job.follow or isinstance(event, Completed | Failed):
                loop.call_soon_threadsafe(queue.put_nowait, event)

        runner = self._backend.runner
        try:
            request = job.request(runner.clock())
            with runner.reserve(job.client) as slot, answering(Call("", job.id, client=job.client)):
                async with self._backend.residency.using(Source(path=job.model)) as model:
                    assert model.pipeline is not None, "a model that is used is in memory"
                    # The first time that a scheduler and steps are seen, this takes a while.
                    await asyncio.to_thread(model.pipeline.plan, request)
                    accepted = runner.submit(request, listen, slot)
                    try:
                        yield Queued(accepted.position, accepted.eta)
                        while not isinstance(event := await queue.get(), Completed | Failed):
                            yield RemoteProgress.of(event) if isinstance(event, Progress) else event
                        yield RemoteCompleted.of(event) if isinstance(event, Completed) else event
                    finally:
                        accepted.ticket.cancel()
        except ServerError as error:
            yield Failed(error)

    async def _give_up(self, why: str) -> None:
        """Tells everybody who waits that this replica is lost, and whoever looks after it."""
        _log.critical("%s", why)
        self._stuck = why
        await self._backend.abandon(EngineStuck("the device does not answer: this replica stops"))


def _nobody(name: str, serving: bool) -> None:
    """Health is told by the fronts."""

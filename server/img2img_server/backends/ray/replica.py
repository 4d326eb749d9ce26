"""A replica of the engine: a local backend that is called by messages.

Independent of Ray, which makes an actor of it (deployment.py). All methods are called on one event loop and never block it.
Errors for callers are returned as Failed, not raised.
"""

import asyncio
import logging
import math
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing

from img2img_server.backends.local import LocalBackend, local
from img2img_server.backends.ray.messages import (
    Card,
    Load,
    Look,
    ModelQuery,
    RemoteRequest,
    Unloaded,
)
from img2img_server.bundle.manifest import Source
from img2img_server.config import ServerConfig
from img2img_server.engine.interface import ignore
from img2img_server.engine.request import Completed, Ending, Event, Failed, Queued, companions_of
from img2img_server.errors import EngineStuck, ServerError
from img2img_server.models.registry import ModelState
from img2img_server.support.call import Call, answering

_log = logging.getLogger(__name__)


class Replica:
    """Runs requests on the backend created by `make`, and manages models like a local server.

    `open` loads and measures the models and must be called first; `close` finishes running requests.
    """

    def __init__(self, config: ServerConfig, make: Callable[[ServerConfig], LocalBackend] = local) -> None:
        self._config = config
        self._backend = make(config)
        self._name = uuid.uuid4().hex
        self._stuck = ""

    async def open(self) -> None:
        """Loads and measures the models, and starts the engine. Raises BundleError, OSError or ValueError on failure."""
        await self._backend.open(_ignore_health, ignore)
        await self._backend.start(self._fail)

    async def close(self) -> None:
        """Refuses new requests, waits for running ones within the grace period, and releases all resources."""
        if not self._stuck:
            await self._backend.drain(self._config.grace)
        await self._backend.close()

    async def transform(self, job: RemoteRequest) -> Ending:
        """Runs one request and returns its ending. Cancelling the call cancels the request."""
        async with aclosing(self.stream(job)) as events:
            async for event in events:
                if isinstance(event, Completed | Failed):
                    return event
        raise AssertionError("the engine ends every request")

    async def bring(self, asked: ModelQuery) -> Card | Failed:
        """Loads a request's model if requests may load models, and returns its card."""
        with answering(asked.call):
            try:
                async with self._backend.residency.using(asked.reference) as model:
                    return Card.of(model)
            except ServerError as error:
                return Failed(error)

    async def load(self, asked: ModelQuery) -> Card | Failed:
        """Loads a model and returns its card."""
        with answering(asked.call):
            try:
                return Card.of(await self._backend.residency.load(asked.reference))
            except ServerError as error:
                return Failed(error)

    async def unload(self, asked: ModelQuery) -> Unloaded | Failed:
        """Frees a model's memory after its requests have ended."""
        with answering(asked.call):
            try:
                return Unloaded(await self._backend.residency.unload(asked.name))
            except ServerError as error:
                return Failed(error)

    async def look(self) -> Look:
        """The replica's models and load."""
        models = self._backend.models
        return Look(self._name, self.load_now(), tuple(Card.of(model) for model in models), models.default)

    def load_now(self) -> Load:
        """The current load, infinite if the engine is stuck. Fast and thread-safe."""
        if self._stuck:
            return Load(math.inf, 0, 0, ())
        stats = self._backend.runner.stats
        resident = tuple(model.id for model in self._backend.models if model.state is ModelState.READY)
        return Load(stats.work_seconds, stats.waiting + stats.arriving, stats.active, resident)

    def loading(self) -> tuple[str, ...]:
        """The ids of the models that are being loaded."""
        return tuple(model.id for model in self._backend.models if model.state is ModelState.LOADING)

    def check_health(self) -> None:
        """Raises EngineStuck if the device does not return from a call, so that Ray replaces the process."""
        if self._stuck:
            raise EngineStuck(self._stuck)

    async def stream(self, job: RemoteRequest) -> AsyncGenerator[Event, None]:
        """Runs one request and yields its events, of which the last is its ending. Closing the generator cancels the request."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event] = asyncio.Queue()

        def listen(event: Event) -> None:
            if request.follow or isinstance(event, Completed | Failed):
                loop.call_soon_threadsafe(queue.put_nowait, event)

        runner = self._backend.runner
        request = job.received(runner.clock())
        try:
            with runner.reserve(request.client) as slot, answering(Call("", request.id, client=request.client)):
                async with AsyncExitStack() as lease:
                    using = self._backend.residency.using
                    model = await lease.enter_async_context(using(Source(path=request.model)))
                    companions = companions_of(request)
                    for name in companions:
                        await lease.enter_async_context(using(Source(path=name)))
                    if companions:
                        await self._backend.residency.open_control(model.id)
                    assert model.pipeline is not None, "a model in use is in memory"
                    # Slow for the first request with a scheduler and number of steps.
                    await asyncio.to_thread(model.pipeline.plan, request)
                    accepted = runner.submit(request, listen, slot)
                    try:
                        yield Queued(accepted.position, accepted.eta)
                        while not isinstance(event := await queue.get(), Completed | Failed):
                            yield event
                        yield event
                    finally:
                        accepted.ticket.cancel()
        except ServerError as error:
            yield Failed(error)

    async def _fail(self, why: str) -> None:
        """Ends all requests with EngineStuck; `check_health` reports it to Ray."""
        _log.critical("%s", why)
        self._stuck = why
        await self._backend.abandon(EngineStuck("the device does not respond: this replica stops"))


def _ignore_health(name: str, serving: bool) -> None:
    """Does nothing: fronts report health."""

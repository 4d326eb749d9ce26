"""Loads models into memory, tests and measures them, and unloads them."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image

from img2img_server.bundle.manifest import Manifest
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Ending, Event, Failed, Pipeline, Request
from img2img_server.engine.warmup import WarmUp
from img2img_server.errors import OutOfMemory, ShuttingDown
from img2img_server.models.cost_store import CostStore
from img2img_server.models.failures import Stage
from img2img_server.models.memory import Closable, Meter, Reading, in_words, let_go, measured
from img2img_server.models.registry import ModelRegistry
from img2img_server.support.device_lock import DEVICE_IN_USE
from img2img_server.support.threads import in_thread

_log = logging.getLogger(__name__)

_TRIAL_STEPS = 2
_TRIAL_PROMPT = ""
_CLIENT = "img2img/loading"
"""The client of trial requests: no token or address can have this name."""

_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A model that is in the engine, tested and measured, but not yet published."""

    manifest: Manifest
    pipeline: Pipeline
    memory: int


class ModelLoader:
    """Loads and frees models, one at a time, so that `meter` measures only that model and running requests.

    `costs` has earlier measurements; `warm_up` records calls. Used on the event loop, which it never blocks.
    """

    def __init__(
        self, models: ModelRegistry, engine: Engine, meter: Meter, costs: CostStore | None = None, warm_up: WarmUp | None = None
    ) -> None:
        self._models = models
        self._engine = engine
        self._meter = meter
        self._costs = costs
        self._warm_up = warm_up
        self._arrived: dict[str, _Arrival] = {}

    async def bring(self, name: str, make_room: Callable[[], Awaitable[bool]]) -> str:
        """Loads the model, draws a trial image and measures it. Returns the problem, or "".

        If memory runs out, calls `make_room`, and retries if that returns True.
        """
        while True:
            self._models.change(name, detail="loading")
            error = await self._attempt(name)
            if error is None:
                return ""
            stage = Stage.TRIAL if name in self._arrived else Stage.LOADING
            await self.discard(name)
            if not (isinstance(error, OutOfMemory | MemoryError) and await make_room()):
                return self._models.fail(name, stage, error)

    def publish(self, name: str) -> None:
        """Makes the loaded model ready for requests."""
        arrival = self._arrived.pop(name)
        pipeline = arrival.pipeline
        self._models.change(name, manifest=arrival.manifest, pipeline=pipeline, problem="", detail="", engines=())
        _log.info("model '%s': ready on %s, %s", name, pipeline.engine, in_words(arrival.memory))

    async def discard(self, name: str) -> None:
        """Unloads the model if it was loaded but not published."""
        arrival = self._arrived.pop(name, None)
        if arrival is None:
            return
        if await in_thread(lambda: self._engine.wait_until_idle(name)):
            self._engine.remove(name)
        pipelines: list[Closable] = [arrival.pipeline]
        del arrival
        await self._let_go(name, pipelines)

    async def free(self, name: str, health: Callable[[str, bool], None]) -> int:
        """Unloads a ready model without requests. Returns the number of bytes freed."""
        before = await self.read()
        pipeline = self._take_out(name)
        engine = pipeline.engine
        pipelines: list[Closable] = [pipeline]
        del pipeline  # the list must have the last reference
        health(name, False)
        await self._let_go(name, pipelines)
        freed = max(0, -(before.grown_to(await self.read(), engine) or 0))
        _log.info("model '%s': unloaded, %s freed", name, in_words(freed))
        return freed

    async def read(self) -> Reading:
        """Measures the memory in use."""
        return await in_thread(self._meter.read)

    async def _let_go(self, name: str, pipelines: list[Closable]) -> None:
        await in_thread(lambda: let_go(pipelines, lambda close: self._engine.call(name, close)))

    def _take_out(self, name: str) -> Pipeline:
        """Removes the model's pipeline from the registry and the engine, and returns it."""
        pipeline = self._models.get(name).pipeline
        assert pipeline is not None, "only ready models are unloaded"
        self._models.change(name, pipeline=None, engines=())
        self._engine.remove(name)
        return pipeline

    async def _attempt(self, name: str) -> Exception | None:
        """Loads and tests the model. Returns its exception, or None."""
        try:
            before = await self.read()
            manifest, pipeline = await in_thread(lambda: self._open(name))
            self._arrived[name] = _Arrival(manifest, pipeline, 0)
            self._engine.replace(name, pipeline)
            await in_thread(lambda: self._ready(name, pipeline))
            await self._try(name, pipeline)
            memory = measured(before.grown_to(await self.read(), pipeline.engine), manifest)
            self._arrived[name] = _Arrival(manifest, pipeline, memory)
            self._models.change(name, manifest=manifest, memory=memory)
        except ShuttingDown:
            raise
        except Exception as error:  # noqa: BLE001 - any library's: only this model cannot be served
            return error
        return None

    def _ready(self, name: str, pipeline: Pipeline) -> None:
        """Restores the model's measured costs, and records its calls between those of other models."""
        known = None if self._costs is None else self._costs.find(self._models.get(name).bundle, pipeline)
        if known is not None:
            self._engine.adopt(name, known)
        if self._warm_up is not None:
            self._warm_up.record(name, pipeline, lambda work: self._engine.call(name, work))

    def _open(self, name: str) -> tuple[Manifest, Pipeline]:
        model = self._models.get(name)
        assert self._models.folder is not None, "what is loaded comes from a folder"
        assert model.bundle is not None, "what is loaded has a bundle"
        with DEVICE_IN_USE:
            return self._models.folder.open(model.bundle)

    async def _try(self, name: str, pipeline: Pipeline) -> None:
        """Draws an image of the model's native size through the engine, which measures its calls.

        It is queued as a client's request: as a background request it could wait forever under load.
        """
        self._models.change(name, detail="drawing a trial image")
        image = Image.new("RGB", pipeline.native_size, "gray")
        request = Request(name, image, _TRIAL_PROMPT, None, 1.0, _TRIAL_STEPS, 7.5, (0,), client=_CLIENT)
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Ending] = loop.create_future()

        def listen(event: Event) -> None:
            if isinstance(event, Completed | Failed):
                loop.call_soon_threadsafe(_settle, ended, event)

        # Not bounded by the queue: the requests that fill it may be waiting for this model.
        accepted = await asyncio.to_thread(self._engine.submit, request, listen, bounded=False)
        try:
            ending = await ended
        finally:
            accepted.ticket.cancel()
        if isinstance(ending, Failed):
            raise ending.error


def _settle(future: "asyncio.Future[_R]", value: _R) -> None:
    if not future.done():
        future.set_result(value)

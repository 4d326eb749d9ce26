"""Loads models into memory, tests and measures them, and unloads them."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from img2img_server.bundle.manifest import Manifest
from img2img_server.engine.costs import Measured
from img2img_server.engine.engine import Engine
from img2img_server.engine.executor import CallsInFlight
from img2img_server.engine.request import Completed, Ending, Event, Failed, Pipeline, Request
from img2img_server.engine.warmup import Size, WarmUp
from img2img_server.errors import OutOfMemory, ShuttingDown
from img2img_server.models.cost_store import CostStore
from img2img_server.models.memory import MemoryReading, Meter, in_words, least_slots, let_go, opened_later, unopened
from img2img_server.models.registry import Hung, ModelRegistry, Stage, kinds_of
from img2img_server.support.device_lock import DEVICE_IN_USE
from img2img_server.support.threads import in_thread

_log = logging.getLogger(__name__)

_TRIAL_STEPS = 2
_TRIAL_PROMPT = ""
_CLIENT = "img2img/loading"
"""The client of trial requests: no token or address can have this name."""

_LOOK = 1.0
"""Maximum seconds between two checks whether a call hangs."""


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
        pipelines = [arrival.pipeline]
        del arrival
        await self._let_go(name, pipelines)

    async def free(self, name: str, health: Callable[[str, bool], None]) -> int:
        """Unloads a ready model without requests. Returns the number of bytes freed."""
        before = await self.read()
        pipelines = [self._take_out(name)]  # the last reference
        engine = pipelines[0].engine
        health(name, False)
        await self._let_go(name, pipelines)
        freed = max(0, -(before.grown_to(await self.read(), engine) or 0))
        _log.info("model '%s': unloaded, %s freed", name, in_words(freed))
        return freed

    async def open_control(self, name: str) -> None:
        """Opens the control graph of the ready model `name`, and adds its memory to the model's. Raises BundleError."""
        pipeline = self._models.get(name).pipeline
        assert pipeline is not None, "a model in use is in memory"

        def work() -> None:
            with self._models.growing(name, self._meter, unopened(pipeline)):
                pipeline.open_control()  # type: ignore[attr-defined]

        await in_thread(work)
        _log.info("model '%s': the control graph is open, %s", name, in_words(self._models.get(name).memory))

    async def read(self) -> MemoryReading:
        """Measures the memory in use."""
        return await in_thread(self._meter.read)

    async def _let_go(self, name: str, pipelines: list[Pipeline]) -> None:
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
            grown = before.grown_to(await self.read(), pipeline.engine)
            memory = self._models.get(name).estimates.measured(manifest, grown)
            self._arrived[name] = _Arrival(manifest, pipeline, memory)
            bundle = self._models.get(name).bundle
            kinds = {} if bundle is None else await in_thread(lambda: kinds_of(bundle, manifest))
            sizes = {"memory": memory, "slots": least_slots(pipeline), "opened": opened_later(pipeline)}
            self._models.change(name, manifest=manifest, **sizes, **kinds)
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
        with DEVICE_IN_USE:
            return self._models.open(name)

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
                loop.call_soon_threadsafe(settle, event)

        def settle(ending: Ending) -> None:
            if not ended.done():
                ended.set_result(ending)

        # Not bounded by the queue: the requests that fill it may be waiting for this model.
        accepted = await asyncio.to_thread(self._engine.submit, request, listen, bounded=False)
        try:
            ending = await ended
        finally:
            accepted.ticket.cancel()
        if isinstance(ending, Failed):
            raise ending.error


class Preparation:
    """Measures the models of `models` for `engine`, which has not started yet.

    `budget` is the time for each model; a call that takes longer than `longest` counts as hung (0: never). Both, and `clock`, are
    in seconds. Batches have at most `max_batch_size` rows. Models with measurements in `costs` are not measured again. Calls of
    `sizes` are recorded, too.
    """

    def __init__(
        self,
        models: ModelRegistry,
        engine: Engine,
        max_batch_size: int,
        budget: float,
        longest: float,
        clock: Callable[[], float] = time.monotonic,
        costs: CostStore | None = None,
        sizes: Sequence[Size] = (),
    ) -> None:
        self._models = models
        self._engine = engine
        self._max_batch_size = max_batch_size
        self._budget = budget
        self._longest = longest
        self._clock = clock
        self._costs = costs
        self._sizes = sizes

    async def run(self) -> None:
        """Warms up one model after the other. A model that fails becomes FAILED and is removed from the engine."""
        pipelines = self._models.pipelines()
        for number, (name, pipeline) in enumerate(pipelines.items(), start=1):
            _log.info("model '%s' (%d of %d): warming up", name, number, len(pipelines))
            try:
                with self._models.growing(name):
                    measured = await self._measure(name, pipeline)
            except Exception as error:  # noqa: BLE001 - any library's: the other models are served
                await self._leave_out(name, pipeline, error)
                continue
            self._engine.adopt(name, measured)
            for line in self._engine.costs.describe(name, self._max_batch_size):
                _log.info("model '%s': %s", name, line)

    async def _measure(self, name: str, pipeline: Pipeline) -> Measured:
        """Measures a model, on the engine's thread if its calls are recorded, else on another thread. Raises the model's errors,
        and Hung."""
        in_flight = CallsInFlight(self._clock)
        warm_up = WarmUp(self._max_batch_size, self._budget, self._clock, in_flight, self._sizes)
        work = asyncio.ensure_future(in_thread(lambda: self._warmed_up(name, pipeline, warm_up)))
        while not work.done():
            await asyncio.wait({work}, timeout=min(_LOOK, self._longest / 10) if self._longest > 0 else None)
            call = in_flight.longest
            if call is not None and 0 < self._longest < call.seconds and not work.done():
                work.cancel()
                if pipeline.row_buckets:
                    self._engine.restart_thread()
                raise Hung(f"{call.stage} of {call.rows} rows did not return within {self._longest:g} s")
        return work.result()

    def _warmed_up(self, name: str, pipeline: Pipeline, warm_up: WarmUp) -> Measured:
        """The model's costs. Recordings belong to the thread that made them, so recorded models are measured on the engine's."""
        if pipeline.row_buckets:
            return self._engine.call(name, lambda: self._known_or_measured(name, pipeline, warm_up))
        return self._known_or_measured(name, pipeline, warm_up)

    def _known_or_measured(self, name: str, pipeline: Pipeline, warm_up: WarmUp) -> Measured:
        bundle = self._models.get(name).bundle
        if self._costs is None:
            return warm_up.measure(name, pipeline)
        if (known := self._costs.find(bundle, pipeline)) is not None:
            warm_up.check(name, pipeline)
            _log.info("model '%s': its costs were measured before", name)
            return known
        measured = warm_up.measure(name, pipeline)
        self._costs.keep(bundle, pipeline, measured)
        return measured

    async def _leave_out(self, name: str, pipeline: Pipeline, error: Exception) -> None:
        self._models.fail(name, Stage.WARM_UP, error)
        self._engine.remove(name)
        if not isinstance(error, Hung):  # a hung call still uses it
            last = [pipeline]
            await in_thread(lambda: let_go(last, lambda close: self._engine.call(name, close)))

"""What serves behind the gRPC front: an engine in this process, or, with the same face, engines that run elsewhere.

The watchdog ends the process if a model call hangs.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from img2img_server.bundle.manifest import Source
from img2img_server.config import ServerConfig
from img2img_server.engine.cache import Cache
from img2img_server.engine.engine import Engine
from img2img_server.engine.interface import EngineInterface, Span
from img2img_server.engine.warmup import WarmUp
from img2img_server.errors import ServerError
from img2img_server.models.cost_store import CostStore
from img2img_server.models.loader import Preparation
from img2img_server.models.promotion import Candidate, Promotion
from img2img_server.models.registry import Model, ModelRegistry
from img2img_server.models.residency import Health, Residency
from img2img_server.support.threads import in_thread
from img2img_server.telemetry.timeline import Trace

_SELDOM = 1.0
"""Seconds between two looks, at the most; a tenth of what a call may take where that is less."""

_PAUSE = 4
"""Looks that are missed in a row before the process counts as paused: fewer are a busy machine."""


class Watchdog:
    """Looks every now and then at how long the engine has been in its current call; says so once where that is more than
    `seconds`. `stuck` gets a line that says what it was, on the watchdog's own thread. With 0 seconds it never looks.

    Time in which the watchdog itself did not run (SIGSTOP, a suspended machine) counts for no call. `clock` is the engine's, in
    seconds.
    """

    def __init__(
        self, engine: Engine, seconds: float, stuck: Callable[[str], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._engine = engine
        self._seconds = seconds
        self._stuck = stuck
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="img2img-watchdog", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        if self._seconds > 0:
            self._thread.start()

    def stop(self) -> None:
        """Looks no more: once it returns, `stuck` is not called. Harmless where it was never started, and from within `stuck`."""
        self._stopped.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        every = min(_SELDOM, self._seconds / 10)
        looked = self._clock()
        pauses: list[tuple[float, float]] = []  # when each ended, and how long it was
        while not self._stopped.wait(every):
            call, now = self._engine.current_call, self._clock()
            missed, looked = now - looked - every, now
            if call is None:
                pauses = []
                continue
            if missed > _PAUSE * every:
                pauses.append((now, missed))
            if call.seconds - sum(missed for ended, missed in pauses if ended > now - call.seconds) > self._seconds:
                rows = f"{call.rows} {'row' if call.rows == 1 else 'rows'}"
                self._stuck(
                    f"the device does not answer: {call.stage} of model '{call.model}' ({rows}) has taken {call.seconds:.0f} s, "
                    f"the most is {self._seconds:g} s"
                )
                return


_log = logging.getLogger(__name__)

_LOADING = 5.0
"""Seconds that a pipeline which is being loaded for a promotion gets at the end: nothing of it is needed."""


class Models(Protocol):
    """Which models can be used, and how one becomes ready: the Residency of this process, or a front's."""

    def using(self, reference: Source) -> AbstractAsyncContextManager[Model]:
        """Within the block the model that `reference` means can be run. Raises what tells the caller why it cannot have it."""
        ...

    async def load(self, reference: Source) -> Model:
        """Makes a model ready, and returns it."""
        ...

    async def unload(self, name: str) -> int:
        """Frees the memory of the model `name`. Returns how many bytes that gave back."""
        ...


class Backend(Protocol):
    """Where requests are run. The methods are called in their order here; the properties are there once `open` is done."""

    @property
    def models(self) -> ModelRegistry:
        """Which models there are."""
        ...

    @property
    def runner(self) -> EngineInterface:
        """What takes requests."""
        ...

    @property
    def residency(self) -> Models:
        """What gives them their models."""
        ...

    @property
    def cache(self) -> Cache | None:
        """The cache of what was encoded, where it is in this process and known."""
        ...

    async def open(self, health: Health, observe: Callable[[Span], None]) -> None:
        """Makes everything ready to run. `health` is told which models can be served from `start` on, `observe` of each stage
        that runs in this process. Raises BundleError, OSError or ValueError where that cannot be done."""
        ...

    async def start(self, stuck: Callable[[str], Awaitable[None]]) -> None:
        """The port is open: requests are run from now on. `stuck` is told in a line why none can be run any more."""
        ...

    async def drain(self, grace: float) -> None:
        """Takes no new requests, gives those that run `grace` seconds, and ends the rest."""
        ...

    async def abandon(self, error: ServerError) -> None:
        """Ends every request with `error` at once. Nothing can be run afterwards."""
        ...

    async def close(self) -> None:
        """Lets go of everything, when all answers were sent. Harmless where it was never opened."""
        ...

    def close_now(self) -> None:
        """In place of `close` where the process ends at once: what is written is whole."""
        ...


class LocalBackend:
    """An engine in this process. `load_models` blocks while it loads; it is run on a thread of its own.

    Every model is loaded and measured before it starts. `cache` is the one that the models use, to tell at the end how it did.
    `contend` gives the engines that are to be built in the background and may take over from those that the models were loaded
    with; it must be quick, and raise nothing. `open_costs` gives where measured costs are kept, once the models are loaded.
    """

    def __init__(
        self,
        config: ServerConfig,
        load_models: Callable[[], ModelRegistry],
        cache: Cache | None = None,
        contend: Callable[[ModelRegistry], Sequence[Candidate]] = lambda models: (),
        open_costs: Callable[[], CostStore | None] = lambda: None,
    ) -> None:
        self._config = config
        self._load_models = load_models
        self._cache = cache
        self._contend = contend
        self._open_costs = open_costs
        self._observe: Callable[[Span], None] | None = None
        self._trace: Trace | None = None
        self._models: ModelRegistry | None = None
        self._engine: Engine | None = None
        self._residency: Residency | None = None
        self._promotion: Promotion | None = None
        self._watchdog: Watchdog | None = None

    @property
    def models(self) -> ModelRegistry:
        """Which models there are."""
        assert self._models is not None, "it was opened"
        return self._models

    @property
    def runner(self) -> Engine:
        """The engine."""
        assert self._engine is not None, "it was opened"
        return self._engine

    @property
    def residency(self) -> Residency:
        """Which models are in memory."""
        assert self._residency is not None, "it was opened"
        return self._residency

    @property
    def cache(self) -> Cache | None:
        """The cache of what was encoded."""
        return self._cache

    async def open(self, health: Health, observe: Callable[[Span], None]) -> None:
        """Loads and measures the models. One that fails is FAILED, and the others are served."""
        self._observe = observe
        if self._config.trace is not None:
            self._trace = _open_trace(self._config.trace)
        models = await in_thread(self._load_models)
        for model in models:
            health(model.id, False)
        limits = self._config.limits
        engine = Engine(models.pipelines(), limits, observe=self._observed)
        costs = await in_thread(self._open_costs)
        warm_up, watchdog = self._config.warm_up, self._config.watchdog
        sizes = [(bucket.width, bucket.height) for bucket in self._config.execution.buckets or ()]
        await Preparation(models, engine, limits.max_batch_size, warm_up, watchdog, costs=costs, sizes=sizes).run()
        models.check_any(self._config.residency)
        self._models, self._engine = models, engine
        recorder = WarmUp(limits.max_batch_size, warm_up, sizes=sizes)
        self._residency = Residency(self._config.residency, models, engine, health, costs=costs, warm_up=recorder)

    async def start(self, stuck: Callable[[str], Awaitable[None]]) -> None:
        """Starts the engine's thread, the promotions and the watchdog."""
        engine, models, residency = self.runner, self.models, self.residency
        engine.start()
        await residency.start()
        candidates = await asyncio.to_thread(self._contend, models)
        self._promotion = Promotion(engine, models, candidates)
        residency.withdraw = self._promotion.withdraw
        self._promotion.start()
        loop = asyncio.get_running_loop()
        told: list[asyncio.Task[None]] = []  # a task that nobody holds may be collected

        def tell(why: str) -> None:
            told.append(asyncio.ensure_future(stuck(why)))

        self._watchdog = Watchdog(engine, self._config.watchdog, lambda why: loop.call_soon_threadsafe(tell, why))
        self._watchdog.start()

    async def drain(self, grace: float) -> None:
        """Lets the engine finish what it has."""
        if self._promotion is not None:
            self._promotion.stop()
        await self.residency.close()
        finished = await in_thread(lambda: self.runner.drain(grace))
        _log.info("drained" if finished else "the grace period is over: ending what still runs")
        await in_thread(self.runner.close)
        if self._watchdog is not None:
            self._watchdog.stop()

    async def abandon(self, error: ServerError) -> None:
        """Ends every request although the engine's thread may be inside a call."""
        if self._promotion is not None:
            self._promotion.stop()
        # Elsewhere, as it may wait for a lock that what is stuck holds.
        await in_thread(lambda: self.runner.abandon(error))

    async def close(self) -> None:
        """Leaves a promotion that is not done, and writes the end of the trace."""
        promotion = self._promotion
        if promotion is not None and not await in_thread(lambda: promotion.join(_LOADING)):
            _log.info("a promotion is left unfinished")
        if self._engine is not None and self._cache is not None:
            _log.info("cache: %s", self._cache.stats)
        if self._trace is not None:
            self._trace.close(caches=asdict(self._cache.stats) if self._cache is not None else {})

    def close_now(self) -> None:
        """Writes the end of the trace."""
        if self._trace is not None:
            self._trace.close()

    def _observed(self, span: Span) -> None:
        if self._trace is not None:
            self._trace.observe(span)
        if self._observe is not None:
            self._observe(span)


def _open_trace(path: Path) -> Trace:
    try:
        return Trace(path)
    except OSError as error:
        raise OSError(f"trace: {path} cannot be written: {error.strerror}") from None

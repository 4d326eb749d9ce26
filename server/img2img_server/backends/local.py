"""The backend with an engine in this process, its watchdog, and the only place that connects pipelines to it."""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from img2img_server.bundle.adapter_files import LoraFiles
from img2img_server.bundle.image_adapters import ImageAdapterFiles
from img2img_server.bundle.manifest import Manifest
from img2img_server.config import ServerConfig
from img2img_server.engine.cache import Cache
from img2img_server.engine.engine import Engine
from img2img_server.engine.interface import Span
from img2img_server.engine.request import Pipeline
from img2img_server.engine.warmup import WarmUp
from img2img_server.errors import ServerError
from img2img_server.models.cost_store import CostStore
from img2img_server.models.loader import Preparation
from img2img_server.models.memory import Estimates
from img2img_server.models.promotion import Candidate, Promotion
from img2img_server.models.registry import ModelRegistry
from img2img_server.models.residency import Health, Residency
from img2img_server.support.distribution import version
from img2img_server.support.threads import in_thread
from img2img_server.telemetry.timeline import Trace

if TYPE_CHECKING:
    from img2img_server.runtime.companions import Companions
    from img2img_server.runtime.image_prompts.prompts import ImageAdapterSettings
    from img2img_server.runtime.lora.adapters import LoraSettings
    from img2img_server.runtime.tensorrt.candidate import RunnerCache

_log = logging.getLogger(__name__)

_LOADING = 5.0
"""Seconds to wait at the end for a pipeline that is being loaded for a promotion, which is not needed any more."""
_WATCH_INTERVAL = 1.0
"""Maximum seconds between two checks of the watchdog; a tenth of its limit if that is less."""

_PAUSE = 4
"""Missed checks in a row after which the process counts as paused; fewer mean a busy machine."""


class Watchdog:
    """Calls `stuck` once, with a line of explanation, if a model call takes more than `seconds`. Disabled with 0 seconds.

    `stuck` is called on the watchdog's thread. Time in which the process was paused (SIGSTOP, a suspended machine) does not
    count. `clock` is the engine's, in seconds.
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
        """Starts the thread."""
        if self._seconds > 0:
            self._thread.start()

    def stop(self) -> None:
        """Stops the thread; afterwards `stuck` is not called. May be called without `start`, and from within `stuck`."""
        self._stopped.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        interval = min(_WATCH_INTERVAL, self._seconds / 10)
        checked = self._clock()
        pauses: list[tuple[float, float]] = []  # the end and duration of each
        while not self._stopped.wait(interval):
            call, now = self._engine.current_call, self._clock()
            missed, checked = now - checked - interval, now
            if call is None:
                pauses = []
                continue
            if missed > _PAUSE * interval:
                pauses.append((now, missed))
            if call.seconds - sum(missed for ended, missed in pauses if ended > now - call.seconds) > self._seconds:
                rows = f"{call.rows} {'row' if call.rows == 1 else 'rows'}"
                self._stuck(
                    f"the device does not respond: {call.stage} of model '{call.model}' ({rows}) has taken {call.seconds:.0f} s, "
                    f"the maximum is {self._seconds:g} s"
                )
                return


class LocalBackend:
    """An engine in this process. `load_models` blocks, so it runs on its own thread.

    Every model is loaded and measured before the engine starts. `cache` is the models' cache, whose statistics are logged at the
    end. `candidates` returns runners to build in the background, which may be promoted to replace the models' own; it must be
    fast and not raise. `open_costs` returns the store of measured costs, after the models are loaded.
    """

    def __init__(
        self,
        config: ServerConfig,
        load_models: Callable[[], ModelRegistry],
        cache: Cache | None = None,
        candidates: Callable[[ModelRegistry], Sequence[Candidate]] = lambda models: (),
        open_costs: Callable[[], CostStore | None] = lambda: None,
    ) -> None:
        self._config = config
        self._load_models = load_models
        self._cache = cache
        self._candidates = candidates
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
        """The known models."""
        assert self._models is not None, "open was called"
        return self._models

    @property
    def runner(self) -> Engine:
        """The engine."""
        assert self._engine is not None, "open was called"
        return self._engine

    @property
    def residency(self) -> Residency:
        """Loads and unloads models."""
        assert self._residency is not None, "open was called"
        return self._residency

    @property
    def cache(self) -> Cache | None:
        """The cache of encoded inputs."""
        return self._cache

    async def open(self, health: Health, observe: Callable[[Span], None]) -> None:
        """Loads and measures the models. A model that fails is FAILED; the others are served."""
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
        candidates = await asyncio.to_thread(self._candidates, models)
        self._promotion = Promotion(engine, models, candidates)
        residency.withdraw = self._promotion.withdraw
        self._promotion.start()
        loop = asyncio.get_running_loop()
        tasks: list[asyncio.Task[None]] = []  # asyncio keeps only weak references

        def report(why: str) -> None:
            tasks.append(asyncio.ensure_future(stuck(why)))

        self._watchdog = Watchdog(engine, self._config.watchdog, lambda why: loop.call_soon_threadsafe(report, why))
        self._watchdog.start()

    async def drain(self, grace: float) -> None:
        """Waits up to `grace` seconds for accepted requests, then ends the rest."""
        if self._promotion is not None:
            self._promotion.stop()
        await self.residency.close()
        finished = await in_thread(lambda: self.runner.drain(grace))
        _log.info("drained" if finished else "the grace period is over: ending the remaining requests")
        await in_thread(self.runner.close)
        if self._watchdog is not None:
            self._watchdog.stop()

    async def abandon(self, error: ServerError) -> None:
        """Ends every request, even if the engine's thread is inside a call."""
        if self._promotion is not None:
            self._promotion.stop()
        # On a thread, because it may wait for a lock that a stuck call holds.
        await in_thread(lambda: self.runner.abandon(error))

    async def close(self) -> None:
        """Cancels an unfinished promotion and completes the timeline."""
        promotion = self._promotion
        if promotion is not None and not await in_thread(lambda: promotion.join(_LOADING)):
            _log.info("a promotion was cancelled")
        if self._engine is not None and self._cache is not None:
            _log.info("cache: %s", self._cache.stats)
        if self._trace is not None:
            self._trace.close(caches=asdict(self._cache.stats) if self._cache is not None else {})

    def close_now(self) -> None:
        """Completes the timeline."""
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


def local(config: ServerConfig) -> LocalBackend:
    """A backend for the bundles in `config.models`. Heavy libraries are imported when it is opened, on a thread.

    Raises BundleError if no bundle can be loaded.
    """
    cache = Cache(config.cache_bytes)
    lora_cache, adapter_cache = Cache(config.loras.cache), Cache(config.image_adapters.cache)
    runner_cache: RunnerCache | None = None
    companions: Companions | None = None

    def loras() -> "LoraSettings | None":
        from img2img_server.runtime.lora.adapters import LoraSettings

        folder = config.loras.folder
        return None if folder is None else LoraSettings(LoraFiles(folder), lora_cache, config.loras.slots)

    def image_adapters() -> "ImageAdapterSettings | None":
        from img2img_server.runtime.image_prompts.prompts import ImageAdapterSettings

        folder = config.image_adapters.folder
        return None if folder is None else ImageAdapterSettings(ImageAdapterFiles(folder), adapter_cache)

    def load(bundle: Path, manifest: Manifest) -> Pipeline:
        from img2img_server.runtime.loader import load_pipeline

        assert runner_cache is not None, "the models are loaded"
        return load_pipeline(
            bundle, manifest, config.execution, cache, keep=runner_cache.keep, loras=loras(), companions=companions,
            image_adapters=image_adapters(),
        )  # fmt: skip

    models = ModelRegistry.find_bundles(
        config.models,
        load,
        config.default_model,
        config.allow_unverified,
        config.residency,
        estimates=Estimates(config.loras.folder is not None, config.execution.offloads),
    )

    def load_models() -> ModelRegistry:
        begun = time.monotonic()
        _log.info("models in %s: %d; importing the libraries that run them", config.models, len(list(models)))
        from img2img_server.runtime.onnx import providers

        # Before the loader's imports, which take seconds.
        providers.check(config.execution.provider)
        import img2img_server.runtime.loader  # noqa: F401 - imports the heavy libraries
        from img2img_server.runtime.common.device_copy import start_device
        from img2img_server.runtime.companions import Companions
        from img2img_server.runtime.tensorrt.candidate import RunnerCache

        nonlocal runner_cache, companions
        runner_cache, companions = RunnerCache(), Companions()
        start_device(config.execution.provider)
        _log.info("libraries imported in %.1f s", time.monotonic() - begun)
        models.preload(config.residency)
        return models

    def candidates(models: ModelRegistry) -> Sequence[Candidate]:
        from img2img_server.runtime.tensorrt import candidate

        assert runner_cache is not None, "the models were loaded"
        return candidate.candidates(models, config.execution, cache, runner_cache, loras(), companions, image_adapters())

    def open_costs() -> CostStore | None:
        from img2img_server.runtime.common import cpu
        from img2img_server.runtime.tensorrt import cache as engine_cache

        try:
            root = config.execution.cache or engine_cache.default_root()
        except RuntimeError:  # a user without a home
            return None
        facts = {
            "img2img": version(),
            "machine": cpu.machine(),
            "free_cores": cpu.count(),
            "execution": {name: str(value) for name, value in asdict(config.execution).items() if name != "cache"},
            "max_batch_size": config.limits.max_batch_size,
            "warm_up": config.warm_up,
        }
        return CostStore(root / engine_cache.COSTS, facts)

    return LocalBackend(config, load_models, cache, candidates, open_costs)

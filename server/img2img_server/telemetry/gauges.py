"""Metrics that are read from the server's components at each scrape."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from img2img_server.assets.store import AssetStore
from img2img_server.codecs.pool import Codecs
from img2img_server.engine.cache import Cache
from img2img_server.engine.interface import EngineInterface
from img2img_server.models.registry import Model, ModelRegistry, ModelState
from img2img_server.telemetry.metrics import COUNTED, PROCESS, MetricInfo

WAITING = MetricInfo("img2img_engine_waiting_requests", "gauge", "Requests that wait for admission")
ACTIVE = MetricInfo("img2img_engine_active_requests", "gauge", "Requests in progress")
WORK = MetricInfo(
    "img2img_engine_work_seconds", "gauge", "Estimated seconds of accepted work that remains; NaN before the first measurement"
)
CALL = MetricInfo("img2img_engine_call_seconds", "gauge", "Duration of the current model call so far, 0 between calls")
CACHE_HITS = MetricInfo("img2img_cache_hits_total", "counter", "Cache hits for encoded prompts and source images")
CACHE_MISSES = MetricInfo("img2img_cache_misses_total", "counter", "Cache misses: prompts and source images that were encoded")
CACHE_EVICTIONS = MetricInfo("img2img_cache_evictions_total", "counter", "Evicted cache entries")
CACHE_ENTRIES = MetricInfo("img2img_cache_entries", "gauge", "Entries in the cache")
CACHE_BYTES = MetricInfo("img2img_cache_bytes", "gauge", "Bytes in the cache")
CACHE_BUDGET = MetricInfo("img2img_cache_budget_bytes", "gauge", "Maximum bytes of the cache")
ASSETS = MetricInfo("img2img_assets", "gauge", "Images stored as assets")
ASSET_BYTES = MetricInfo("img2img_assets_bytes", "gauge", "Bytes of images stored as assets")
ASSET_QUOTA = MetricInfo("img2img_assets_quota_bytes", "gauge", "Maximum bytes of stored assets")
CODEC_RUNNING = MetricInfo("img2img_codec_running_jobs", "gauge", "Images that are being decoded or encoded", ("stage",))
CODEC_WAITING = MetricInfo("img2img_codec_waiting_jobs", "gauge", "Images that wait to be decoded or encoded", ("stage",))
IMAGE_MEMORY = MetricInfo("img2img_image_memory_bytes", "gauge", "Bytes of images that are being received or decoded")
IMAGE_MEMORY_BUDGET = MetricInfo(
    "img2img_image_memory_budget_bytes", "gauge", "Maximum bytes of images being received or decoded"
)
IMAGE_MEMORY_REFUSED = MetricInfo("img2img_image_memory_refused_total", "counter", "Images refused for lack of memory")
MODEL_STATE = MetricInfo("img2img_model_state", "gauge", "1 for the model's current state, 0 for all others", ("model", "state"))
MODEL_MEMORY = MetricInfo(
    "img2img_model_memory_bytes", "gauge", "Memory of a model, 0 if it is not ready or not measured", ("model",)
)
MODEL_INFO = MetricInfo(
    "img2img_model_info",
    "gauge",
    "Always 1; the labels name the engine of a loaded model",
    ("model", "engine", "backend", "precision"),
)
DEVICE_FREE = MetricInfo("img2img_device_memory_free_bytes", "gauge", "Free memory of a GPU; absent on the CPU", ("device",))
DEVICE_TOTAL = MetricInfo("img2img_device_memory_total_bytes", "gauge", "Total memory of a GPU; absent on the CPU", ("device",))
ASKED = (
    WAITING, ACTIVE, WORK, CALL, CACHE_HITS, CACHE_MISSES, CACHE_EVICTIONS, CACHE_ENTRIES, CACHE_BYTES, CACHE_BUDGET,
    ASSETS, ASSET_BYTES, ASSET_QUOTA, CODEC_RUNNING, CODEC_WAITING, IMAGE_MEMORY, IMAGE_MEMORY_BUDGET, IMAGE_MEMORY_REFUSED,
    MODEL_STATE, MODEL_MEMORY, MODEL_INFO, DEVICE_FREE, DEVICE_TOTAL,
)  # fmt: skip
"""All metrics of this module."""

STATES = tuple(state.name.lower() for state in ModelState)
"""The values of the label `state`."""

Family = CounterMetricFamily | GaugeMetricFamily


class Gauges(Collector):
    """Reads the components. Runs on a thread of the metrics server; holds the engine's lock only briefly."""

    def __init__(
        self, engine: EngineInterface, models: ModelRegistry, cache: Cache | None, assets: AssetStore, codecs: Codecs
    ) -> None:
        self._engine = engine
        self._models = models
        self._cache = cache
        self._assets = assets
        self._codecs = codecs

    def describe(self) -> Iterable[Family]:
        """Nothing; otherwise registration would call `collect`."""
        return ()

    def collect(self) -> Iterator[Family]:
        """Yields the current values of all metrics."""
        yield from self._of_the_engine()
        yield from self._of_the_cache()
        yield from self._of_assets()
        yield from self._of_codecs()
        yield from self._of_models()
        yield from _of_the_device()

    def _of_the_engine(self) -> Iterator[Family]:
        stats = self._engine.stats
        yield _family(WAITING, ((), stats.waiting))
        yield _family(ACTIVE, ((), stats.active))
        yield _family(WORK, ((), float("nan") if stats.work_seconds is None else stats.work_seconds))
        yield _family(CALL, ((), stats.call_seconds))

    def _of_the_cache(self) -> Iterator[Family]:
        if self._cache is None:
            return
        stats = self._cache.stats
        yield _family(CACHE_HITS, ((), stats.hits))
        yield _family(CACHE_MISSES, ((), stats.misses))
        yield _family(CACHE_EVICTIONS, ((), stats.evictions))
        yield _family(CACHE_ENTRIES, ((), stats.entries))
        yield _family(CACHE_BYTES, ((), stats.bytes))
        yield _family(CACHE_BUDGET, ((), self._cache.budget))

    def _of_assets(self) -> Iterator[Family]:
        stats = self._assets.stats
        yield _family(ASSETS, ((), stats.count))
        yield _family(ASSET_BYTES, ((), stats.bytes))
        yield _family(ASSET_QUOTA, ((), stats.quota))

    def _of_codecs(self) -> Iterator[Family]:
        stats, memory = self._codecs.stats, self._codecs.memory
        yield _family(CODEC_RUNNING, *(((stage,), of.running) for stage, of in stats.items()))
        yield _family(CODEC_WAITING, *(((stage,), of.waiting) for stage, of in stats.items()))
        yield _family(IMAGE_MEMORY, ((), memory.held))
        yield _family(IMAGE_MEMORY_BUDGET, ((), memory.budget))
        yield _family(IMAGE_MEMORY_REFUSED, ((), memory.refused))

    def _of_models(self) -> Iterator[Family]:
        models = list(self._models)
        states = [((model.id, state), float(state == model.state.name.lower())) for model in models for state in STATES]
        yield _family(MODEL_STATE, *states)
        yield _family(MODEL_MEMORY, *(((model.id,), model.memory if model.state is ModelState.READY else 0) for model in models))
        yield _family(MODEL_INFO, *((_info(model), 1) for model in models if model.pipeline is not None))


def _info(model: Model) -> tuple[str, str, str, str]:
    """The values of MODEL_INFO's labels for a loaded model."""
    assert model.manifest is not None, "a loaded model has a manifest"
    assert model.pipeline is not None, "a loaded model has a pipeline"
    return model.id, model.pipeline.engine, model.manifest.backend, model.manifest.precision


def _of_the_device() -> Iterator[Family]:
    """A GPU's memory, if torch already uses one: reading metrics must not initialize CUDA."""
    torch: Any = sys.modules.get("torch")
    memory = [
        (str(device), torch.cuda.mem_get_info(device))
        for device in (range(torch.cuda.device_count()) if torch is not None and torch.cuda.is_initialized() else ())
    ]
    yield _family(DEVICE_FREE, *(((device,), free) for device, (free, _) in memory))
    yield _family(DEVICE_TOTAL, *(((device,), total) for device, (_, total) in memory))


def _family(about: MetricInfo, *values: tuple[tuple[str, ...], float]) -> Family:
    """The metric with its values, each with the values of its labels."""
    kind = CounterMetricFamily if about.kind == "counter" else GaugeMetricFamily
    family = kind(about.name, about.help, labels=about.labels)
    for labels, value in values:
        family.add_metric(labels, value)
    return family


def describe() -> str:
    """Every metric, its kind, its labels and its meaning, as a table in Markdown."""
    rows = [f"| `{it.name}` | {it.kind} | {', '.join(it.labels)} | {it.help} |" for it in (*COUNTED, *ASKED, *PROCESS)]
    return "\n".join(("| metric | kind | labels | meaning |", "|---|---|---|---|", *rows))

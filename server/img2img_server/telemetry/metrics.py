"""Prometheus metrics, served over HTTP: counters updated as events happen, and gauges read from the components at each scrape."""

import platform
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from wsgiref.simple_server import WSGIServer

import prometheus_client
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from img2img.v1 import asset_pb2, image_to_image_pb2, model_pb2
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from img2img_server.assets.store import AssetStore
from img2img_server.codecs.pool import Codecs
from img2img_server.engine.cache import Cache
from img2img_server.engine.interface import EngineInterface, Span
from img2img_server.models.registry import Model, ModelRegistry, ModelState
from img2img_server.support import distribution
from img2img_server.telemetry.request_traces import Record, RequestTrace

_M = TypeVar("_M", Counter, Gauge, Histogram)

_CALL_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
_STAGE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
_SIZES = (1, 2, 4, 8, 16, 32, 64)
_CONTRACTS = (image_to_image_pb2, model_pb2, asset_pb2, health_pb2, reflection_pb2)
_MOST_CLIENTS = 200
"""Maximum token names with their own series. All further ones share the label "other"."""


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """A metric: its name, its Prometheus type, its help text, and its labels."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()


BUILD = MetricInfo(
    "img2img_build_info", "gauge", "Always 1; the labels name the version and the libraries", ("version", "python")
)
REQUESTS = MetricInfo(
    "img2img_requests_total",
    "counter",
    "Finished calls, by method, gRPC status, ErrorInfo reason and name of the client's token",
    ("method", "status", "reason", "client"),
)
CALL_SECONDS = MetricInfo(
    "img2img_call_duration_seconds", "histogram", "Duration of calls, from arrival to response", ("method",)
)
IN_PROGRESS = MetricInfo("img2img_calls_in_progress", "gauge", "Calls in progress", ("method",))
STAGE_SECONDS = MetricInfo(
    "img2img_transform_stage_duration_seconds",
    "histogram",
    "Duration of finished transforms by stage: queue, encode, denoise and decode in the engine, total from arrival to response",
    ("model", "stage"),
)
IMAGES = MetricInfo("img2img_pictures_total", "counter", "Images generated", ("model",))
DEVICE_SECONDS = MetricInfo(
    "img2img_device_call_duration_seconds",
    "histogram",
    "Duration of model calls: prepare (encoding), denoise (one step of a batch), advance, preview and finish (decoding)",
    ("model", "stage"),
)
BATCH_ROWS = MetricInfo("img2img_batch_rows", "histogram", "Rows of a step's batch; an image with guidance takes two", ("model",))
BATCH_REQUESTS = MetricInfo("img2img_batch_requests", "histogram", "Requests in a step's batch", ("model",))
COUNTED = (BUILD, REQUESTS, CALL_SECONDS, IN_PROGRESS, STAGE_SECONDS, IMAGES, DEVICE_SECONDS, BATCH_ROWS, BATCH_REQUESTS)
"""Metrics that are updated as events happen."""

PROCESS = (
    MetricInfo("process_resident_memory_bytes", "gauge", "Resident memory of the process"),
    MetricInfo("process_virtual_memory_bytes", "gauge", "Virtual memory of the process"),
    MetricInfo("process_cpu_seconds_total", "counter", "CPU time of the process"),
    MetricInfo("process_start_time_seconds", "gauge", "Start time of the process in seconds since the Unix epoch"),
    MetricInfo("process_open_fds", "gauge", "Open files and connections"),
    MetricInfo("process_max_fds", "gauge", "Maximum number of open files and connections"),
)
"""Metrics of the process by prometheus_client, on Linux."""

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
"""Metrics that are read at each scrape."""


class Metrics:
    """Counters in a separate registry. Thread-safe; counting never waits for a scrape."""

    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call] # unused series
        self.registry = CollectorRegistry()
        _make(Gauge, BUILD, self.registry).labels(distribution.version(), platform.python_version()).set(1)
        self._requests = _make(Counter, REQUESTS, self.registry)
        self._call_seconds = _make(Histogram, CALL_SECONDS, self.registry, buckets=_CALL_SECONDS)
        self._in_progress = _make(Gauge, IN_PROGRESS, self.registry)
        self._stages = _make(Histogram, STAGE_SECONDS, self.registry, buckets=_STAGE_SECONDS)
        self._images = _make(Counter, IMAGES, self.registry)
        self._device = _make(Histogram, DEVICE_SECONDS, self.registry, buckets=_STAGE_SECONDS)
        self._rows = _make(Histogram, BATCH_ROWS, self.registry, buckets=_SIZES)
        self._batches = _make(Histogram, BATCH_REQUESTS, self.registry, buckets=_SIZES)
        ProcessCollector(registry=self.registry)
        self._methods = _methods()
        self._clients: set[str] = set()
        self._of_stages: dict[tuple[str, str], Histogram] = {}
        self._of_batches: dict[str, tuple[Histogram, Histogram]] = {}
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None

    def start(self, host: str, port: int) -> int:
        """Serves the metrics at http://host:port/metrics and returns the port; port 0 chooses a free one. Raises OSError."""
        self._server, self._thread = prometheus_client.start_http_server(port, host, self.registry)
        return self._server.server_port

    def close(self) -> None:
        """Stops serving."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._server = None

    def serves(self, service: ServiceDescriptor) -> None:
        """Counts calls of this service's methods by their names."""
        self._methods |= _names(service)

    def names(self, methods: Mapping[str, str]) -> None:
        """Counts calls of these methods by their names."""
        self._methods |= methods

    def began(self, record: Record) -> None:
        """Counts the start of a call."""
        self._in_progress.labels(self._method(record)).inc()

    def ended(self, record: Record, seconds: float) -> None:
        """Counts the end of a call that took `seconds`."""
        method, outcome = self._method(record), record.outcome
        self._call_seconds.labels(method).observe(seconds)
        self._requests.labels(method, outcome.status, outcome.reason, self._client(record.token)).inc()
        if record.trace is not None and outcome.status == "OK":
            self._finished(record.trace, seconds)
        self._in_progress.labels(method).dec()  # last, so that everything is counted when no call is in progress

    def span(self, span: Span) -> None:
        """Counts a model call. Called on the engine's thread; does not block."""
        stage = self._of_stages.get((span.model, span.stage))
        if stage is None:
            stage = self._of_stages[span.model, span.stage] = self._device.labels(span.model, span.stage)
        stage.observe(span.seconds)
        if span.stage == "denoise":
            batch = self._of_batches.get(span.model)
            if batch is None:
                batch = self._of_batches[span.model] = self._rows.labels(span.model), self._batches.labels(span.model)
            batch[0].observe(span.rows)
            batch[1].observe(span.requests)

    def _finished(self, trace: RequestTrace, seconds: float) -> None:
        timings, model = trace.timings, trace.request.model
        if timings is None:
            return
        for stage in ("queue", "encode", "denoise", "decode"):
            self._stages.labels(model, stage).observe(getattr(timings, stage))
        self._stages.labels(model, "total").observe(seconds)
        self._images.labels(model).inc(trace.images)

    def _method(self, record: Record) -> str:
        return self._methods.get(record.call.method, "other")

    def _client(self, name: str) -> str:
        if name not in self._clients and len(self._clients) >= _MOST_CLIENTS:
            return "other"
        self._clients.add(name)
        return name


def _make(kind: Callable[..., _M], about: MetricInfo, registry: CollectorRegistry, **more: Sequence[float]) -> _M:
    return kind(about.name, about.help, about.labels, registry=registry, **more)


def _methods() -> dict[str, str]:
    """The labels of all known methods, such as "ImageToImageService/Transform", without the version."""
    services = [service for contract in _CONTRACTS for service in contract.DESCRIPTOR.services_by_name.values()]
    known = {path: label for service in services for path, label in _names(service).items()}
    return known | {"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": "ServerReflection/ServerReflectionInfo"}


def _names(service: ServiceDescriptor) -> dict[str, str]:
    return {f"/{service.full_name}/{method.name}": f"{service.name}/{method.name}" for method in service.methods}


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
        """No metrics; otherwise registration would call `collect`."""
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
        yield _family(
            MODEL_MEMORY,
            *(((model.id,), model.memory + model.slot_memory if model.state is ModelState.READY else 0) for model in models),
        )
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

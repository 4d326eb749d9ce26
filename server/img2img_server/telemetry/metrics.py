"""Prometheus metrics: counted as events happen, and served over HTTP. gauges.py has the metrics that are read at each scrape."""

import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar
from wsgiref.simple_server import WSGIServer

import prometheus_client
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from img2img.v1 import asset_pb2, image_to_image_pb2, model_pb2
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from img2img_server.engine.interface import Span
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
PICTURES = MetricInfo("img2img_pictures_total", "counter", "Images generated", ("model",))
DEVICE_SECONDS = MetricInfo(
    "img2img_device_call_duration_seconds",
    "histogram",
    "Duration of model calls: prepare (encoding), denoise (one step of a batch), advance, preview and finish (decoding)",
    ("model", "stage"),
)
BATCH_ROWS = MetricInfo("img2img_batch_rows", "histogram", "Rows of a step's batch; an image with guidance takes two", ("model",))
BATCH_REQUESTS = MetricInfo("img2img_batch_requests", "histogram", "Requests in a step's batch", ("model",))
COUNTED = (BUILD, REQUESTS, CALL_SECONDS, IN_PROGRESS, STAGE_SECONDS, PICTURES, DEVICE_SECONDS, BATCH_ROWS, BATCH_REQUESTS)
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
        self._pictures = _make(Counter, PICTURES, self.registry)
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
        self._pictures.labels(model).inc(trace.images)

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

"""Metrics for Prometheus: what there is, counted as it happens, and served over HTTP."""

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
"""Names of tokens that get series of their own. Those of a server that has more share the label "other"."""


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """A metric: its name as it is served, its kind in Prometheus' words, what it tells, and its labels."""

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
"""What is counted as it happens. What is asked when Prometheus asks is in gauges.py."""

PROCESS = (
    MetricInfo("process_resident_memory_bytes", "gauge", "Resident memory of the process"),
    MetricInfo("process_virtual_memory_bytes", "gauge", "Virtual memory of the process"),
    MetricInfo("process_cpu_seconds_total", "counter", "CPU time of the process"),
    MetricInfo("process_start_time_seconds", "gauge", "Start time of the process in seconds since the Unix epoch"),
    MetricInfo("process_open_fds", "gauge", "Open files and connections"),
    MetricInfo("process_max_fds", "gauge", "Maximum number of open files and connections"),
)
"""What prometheus_client tells of the process, on Linux."""


class Metrics:
    """Counts, in a registry of its own. Any thread may count; none ever waits for one that serves."""

    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call] # series that nobody asks for
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
        """Serves them at http://host:port/metrics, port 0 for a free one, and returns the port. Raises OSError."""
        self._server, self._thread = prometheus_client.start_http_server(port, host, self.registry)
        return self._server.server_port

    def close(self) -> None:
        """Serves no more."""
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
        """Counts a call that begins."""
        self._in_progress.labels(self._method(record)).inc()

    def ended(self, record: Record, seconds: float) -> None:
        """Counts a call that took `seconds`."""
        method, outcome = self._method(record), record.outcome
        self._call_seconds.labels(method).observe(seconds)
        self._requests.labels(method, outcome.status, outcome.reason, self._client(record.token)).inc()
        if record.trail is not None and outcome.status == "OK":
            self._finished(record.trail, seconds)
        self._in_progress.labels(method).dec()  # at last: when nothing is in progress, everything is counted

    def span(self, span: Span) -> None:
        """Counts a call of a model. On the engine's thread: nothing here waits."""
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

    def _finished(self, trail: RequestTrace, seconds: float) -> None:
        timings, model = trail.timings, trail.request.model
        if timings is None:
            return
        for stage in ("queue", "encode", "denoise", "decode"):
            self._stages.labels(model, stage).observe(getattr(timings, stage))
        self._stages.labels(model, "total").observe(seconds)
        self._pictures.labels(model).inc(trail.pictures)

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
    """The label of each method that there is: "ImageToImageService/Transform". One per version would tell nobody anything."""
    services = [service for contract in _CONTRACTS for service in contract.DESCRIPTOR.services_by_name.values()]
    known = {path: label for service in services for path, label in _names(service).items()}
    return known | {"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": "ServerReflection/ServerReflectionInfo"}


def _names(service: ServiceDescriptor) -> dict[str, str]:
    return {f"/{service.full_name}/{method.name}": f"{service.name}/{method.name}" for method in service.methods}

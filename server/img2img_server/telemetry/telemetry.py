"""Metrics, traces, and one log line per call."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from img2img_server.assets.store import AssetStore
from img2img_server.codecs.pool import Codecs
from img2img_server.config import TelemetrySettings
from img2img_server.engine.cache import Cache
from img2img_server.engine.interface import EngineInterface, Span
from img2img_server.engine.request import Request
from img2img_server.models.registry import ModelRegistry
from img2img_server.support.call import Call
from img2img_server.support.listen_addresses import check_port
from img2img_server.telemetry.logs import ACCESS
from img2img_server.telemetry.request_traces import Outcome, Record, RequestTrace

if TYPE_CHECKING:
    from google.protobuf.descriptor import ServiceDescriptor

    from img2img_server.telemetry.metrics import Metrics
    from img2img_server.telemetry.traces import Traces

__all__ = ["Outcome", "RequestTrace", "Telemetry"]

_log = logging.getLogger(__name__)
_access = logging.getLogger(ACCESS)

_QUIET = (
    *("/grpc.health.v1.Health/", "/grpc.reflection."),
    *("GET /health", "GET /ready"),
    *(f"/inference.GRPCInferenceService/{name}" for name in ("ServerLive", "ServerReady", "ModelReady")),
)
"""Frequent methods that do no work for a client: they are logged at DEBUG, and not traced."""

_RECORD: ContextVar[Record | None] = ContextVar("img2img_record", default=None)


class Telemetry:
    """Metrics, traces and the log of calls, as far as they are configured.

    Events on the engine's thread are only counted or stored. Traces are created at the call's end, on another thread.
    """

    def __init__(self, settings: TelemetrySettings) -> None:
        self._settings = settings
        self._metrics: Metrics | None = None
        self._traces: Traces | None = None
        self._request_traces: dict[int, RequestTrace] = {}
        self.metrics_port: int | None = None

    def start(self) -> None:
        """Serves metrics and connects to the trace collector, if configured.

        Raises OSError if the port is in use and ValueError if a package is missing. `watch` adds further metrics later.
        """
        if self._settings.otlp_endpoint is not None:
            from img2img_server.telemetry.traces import Traces

            self._traces = Traces(self._settings.otlp_endpoint)
            _log.info("sending traces to %s", self._settings.otlp_endpoint)
        if self._settings.metrics_port is not None:
            from img2img_server.telemetry.metrics import Metrics

            host, metrics = self._settings.metrics_host, Metrics()
            check_port("metrics_port", host, self._settings.metrics_port)
            self.metrics_port = metrics.start(host, self._settings.metrics_port)
            self._metrics = metrics
            _log.info("metrics on http://%s:%d/metrics", f"[{host}]" if ":" in host else host, self.metrics_port)

    def close(self) -> None:
        """Sends remaining traces, for a few seconds at most, and stops. Blocks meanwhile."""
        if self._metrics is not None:
            self._metrics.close()
        if self._traces is not None:
            self._traces.close()
        self._metrics = self._traces = None

    def watch(
        self, engine: EngineInterface, models: ModelRegistry, cache: Cache | None, assets: AssetStore, codecs: Codecs
    ) -> None:
        """Adds the metrics of these components. Called once, after start()."""
        if self._metrics is not None:
            from img2img_server.telemetry.metrics import Gauges

            self._metrics.registry.register(Gauges(engine, models, cache, assets, codecs))

    def serves(self, service: "ServiceDescriptor") -> None:
        """Adds the methods of `service` to the known labels."""
        if self._metrics is not None:
            self._metrics.serves(service)

    def names(self, methods: Mapping[str, str]) -> None:
        """Adds these methods, with their names, to the known labels."""
        if self._metrics is not None:
            self._metrics.names(methods)

    @contextmanager
    def call(self, call: Call) -> Iterator[Outcome]:
        """Observes one call. The block sets the yielded outcome before it ends."""
        record = Record(call, time.monotonic())
        before = _RECORD.get()
        _RECORD.set(record)  # restored by value: see support.call.answering
        if self._metrics is not None:
            self._metrics.began(record)
        try:
            yield record.outcome
        finally:
            _RECORD.set(before)
            self._ended(record, time.monotonic())

    def span(self, span: Span) -> None:
        """Observes a stage that ran on the engine's thread."""
        if self._metrics is not None:
            self._metrics.span(span)
        if self._request_traces:
            for request in span.members:
                if (trace := self._request_traces.get(id(request))) is not None:
                    trace.record_span(span)

    def trace(self, request: Request) -> RequestTrace:
        """A new trace of a request of the current call."""
        trace = RequestTrace(request)
        if (record := _RECORD.get()) is not None:
            record.trace = trace
            if self._traces is not None:
                self._request_traces[id(request)] = trace
        return trace

    def _ended(self, record: Record, now: float) -> None:
        seconds, quiet = now - record.began, record.call.method.startswith(_QUIET)
        if record.trace is not None:
            self._request_traces.pop(id(record.trace.request), None)
        if self._metrics is not None:
            self._metrics.ended(record, seconds)
        if self._traces is not None and not quiet:
            self._traces.add(record, now)
        level = logging.DEBUG if quiet else logging.INFO
        if _access.isEnabledFor(level):
            _log_call(record, seconds, level)


def _log_call(record: Record, seconds: float, level: int) -> None:
    call, outcome = record.call, record.outcome
    client = outcome.client or call.client
    extra: dict[str, object] = {
        "request_id": call.request_id,
        "client": client,
        "method": call.method,
        "status": outcome.status,
    }
    extra |= {"reason": outcome.reason, "seconds": round(seconds, 6)}
    # Successful transforms, and calls with a token, always have their own line. Other calls, which anyone can make, may be
    # summarized.
    fine = outcome.status == "OK" and (record.trace is not None or bool(record.token))
    extra["kind"] = None if fine else (call.method, outcome.status, outcome.reason, record.token)
    if record.trace is not None:
        extra["model"] = record.trace.request.model
    status = f"{outcome.status} {outcome.reason}".rstrip()
    _access.log(level, "%s %s in %.3f s for %s", call.method, status, seconds, client or "unknown", extra=extra)

"""What the outside is told of the server: metrics, traces, and a line in the log for each call."""

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
"""Methods that are asked again and again and tell of nobody's work: their lines are for DEBUG, and they leave no traces."""

_RECORD: ContextVar[Record | None] = ContextVar("img2img_record", default=None)


class Telemetry:
    """Metrics, traces and the log of calls. Harmless where nothing of it is configured.

    Raises ValueError where traces are asked for and the packages for them are not there. What is told on the engine's thread is
    counted or noted, and no more: traces are put together when the call has ended, on the thread that answers it.
    """

    def __init__(self, settings: TelemetrySettings) -> None:
        self._settings = settings
        self._metrics: Metrics | None = None
        self._traces: Traces | None = None
        self._trails: dict[int, RequestTrace] = {}
        self.metrics_port: int | None = None

    def start(self) -> None:
        """Serves metrics and connects to the collector, where that is configured.

        Raises OSError where the port is taken, ValueError where a package is missing. Prometheus is answered from here on, with
        what there is: `watch` may come later.
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
        """Sends what is left, for a few seconds at most, and stops. Blocks meanwhile."""
        if self._metrics is not None:
            self._metrics.close()
        if self._traces is not None:
            self._traces.close()
        self._metrics = self._traces = None

    def watch(
        self, engine: EngineInterface, models: ModelRegistry, cache: Cache | None, assets: AssetStore, codecs: Codecs
    ) -> None:
        """From now on, tells of these, too. Once, after start()."""
        if self._metrics is not None:
            from img2img_server.telemetry.gauges import Gauges

            self._metrics.registry.register(Gauges(engine, models, cache, assets, codecs))

    def serves(self, service: "ServiceDescriptor") -> None:
        """From now on, tells of the methods of `service`, too, by their names."""
        if self._metrics is not None:
            self._metrics.serves(service)

    def names(self, methods: Mapping[str, str]) -> None:
        """From now on, tells of these methods, too, each by its name."""
        if self._metrics is not None:
            self._metrics.names(methods)

    @contextmanager
    def call(self, call: Call) -> Iterator[Outcome]:
        """Observes one call, whose outcome is known when the block ends."""
        record = Record(call, time.monotonic())
        before = _RECORD.get()
        _RECORD.set(record)  # set back by value: see calls.answering
        if self._metrics is not None:
            self._metrics.began(record)
        try:
            yield record.outcome
        finally:
            _RECORD.set(before)
            self._ended(record, time.monotonic())

    def span(self, span: Span) -> None:
        """Takes notice of a stage that ran on the engine's thread."""
        if self._metrics is not None:
            self._metrics.span(span)
        if self._trails:
            for request in span.members:
                trail = self._trails.get(id(request))
                if trail is not None:
                    trail.note(span)

    def trail(self, request: Request) -> RequestTrace:
        """Follows a request of the current call."""
        trail = RequestTrace(request)
        record = _RECORD.get()
        if record is not None:
            record.trail = trail
            if self._traces is not None:
                self._trails[id(request)] = trail
        return trail

    def _ended(self, record: Record, now: float) -> None:
        seconds, quiet = now - record.began, record.call.method.startswith(_QUIET)
        if record.trail is not None:
            self._trails.pop(id(record.trail.request), None)
        if self._metrics is not None:
            self._metrics.ended(record, seconds)
        if self._traces is not None and not quiet:
            self._traces.tell(record, now)
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
    # A call that did work, or one of a client that is known, has its own line; others, which anybody can make, are counted.
    fine = outcome.status == "OK" and (record.trail is not None or bool(record.token))
    extra["kind"] = None if fine else (call.method, outcome.status, outcome.reason, record.token)
    if record.trail is not None:
        extra["model"] = record.trail.request.model
    status = f"{outcome.status} {outcome.reason}".rstrip()
    _access.log(level, "%s %s in %.3f s for %s", call.method, status, seconds, client or "nobody", extra=extra)

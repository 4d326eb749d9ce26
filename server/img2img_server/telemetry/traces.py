"""OpenTelemetry traces: a span per call, with child spans for the stages of a transform.

    img2img.v1.ImageToImageService/Transform
        parse       fetch and decode the source, find the model (and load it if it is not in memory)
        queue       wait for admission
        encode      encode prompt and image, together with other requests
        denoise     from the first step to the last
            step    one call of the denoiser, shared with other requests; other batches may run between two steps
        decode
        respond     encode the images and send them, no faster than the client reads

A step is a span instead of an event of "denoise", because time between two steps belongs to other requests. The first
request_traces.MOST_STEPS steps have spans. Times are of the engine's clock.

Spans are created after the call has ended, on a separate thread, because a span takes tens of microseconds.
https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from img2img_server.engine.request import Ticket
from img2img_server.support import distribution
from img2img_server.telemetry.request_traces import Record, RequestTrace

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import SpanKind

_log = logging.getLogger(__name__)

_FLUSH = 3.0
"""Seconds to send the remaining spans at the end."""
_EXPORT = 10.0
"""Time limit of sending one batch of spans, in seconds."""
_MOST_WAITING = 1000
"""Maximum calls whose traces wait to be created. Traces of further calls are dropped."""
_FAULTS = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
"""Statuses that are server errors by OpenTelemetry's conventions. The others are client errors."""

_Attributes = dict[str, str | int | float]


@dataclass(slots=True)
class _Stage:
    """A span of a call or of a stage. `error` is the reason of the failure that ended it. Times are of time.monotonic."""

    name: str
    start: float
    end: float
    attributes: _Attributes = field(default_factory=dict)
    error: str = ""
    parts: "list[_Stage]" = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Ended:
    """A call that has ended, and the offset from its times to nanoseconds since 1970."""

    call: _Stage
    traceparent: str
    offset: int


class Traces:
    """Sends traces to the collector at `endpoint`, by OTLP over gRPC: http://... without TLS, https://... with TLS.

    OpenTelemetry's own variables apply: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER,
    OTEL_EXPORTER_OTLP_HEADERS. Raises ValueError if its packages are missing.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ValueError(f"otlp_endpoint needs '{error.name}': {distribution.install_hint('telemetry')}") from None
        version = distribution.version()
        name = os.environ.get("OTEL_SERVICE_NAME", "img2img")
        self._exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT)
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": name, "service.version": version}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("img2img_server", version)
        self._ended: queue.Queue[_Ended | None] = queue.Queue(_MOST_WAITING)
        self._full = False
        self._thread = threading.Thread(target=self._run, name="img2img-traces", daemon=True)
        self._thread.start()

    def add(self, record: Record, ended: float) -> None:
        """Queues the trace of a call that ended at `ended`, on time.monotonic. Does not block."""
        offset = time.time_ns() - _nanoseconds(time.monotonic())  # one for all of a call's times, since clocks may be set
        stages = list(_stages(record, record.trace, ended)) if record.trace is not None else []
        call = _Stage(record.call.method.lstrip("/"), record.began, ended, _attributes(record), parts=stages)
        if record.outcome.status in _FAULTS:
            call.error = record.outcome.reason or record.outcome.status
        try:
            self._ended.put_nowait(_Ended(call, record.call.traceparent, offset))
        except queue.Full:
            if not self._full:
                self._full = True
                _log.warning("calls finish faster than traces are created: some traces are dropped")

    def close(self) -> None:
        """Sends the remaining traces, for a few seconds at most."""
        sending = threading.Thread(target=self._send_the_rest, name="img2img-traces-end", daemon=True)
        sending.start()
        sending.join(_FLUSH)
        if sending.is_alive():
            self._exporter.shutdown()  # cancels the current attempt and further retries
            sending.join(_FLUSH)

    def _send_the_rest(self) -> None:
        self._ended.put(None)
        self._thread.join()
        self._provider.shutdown()

    def _run(self) -> None:
        from opentelemetry.trace import SpanKind

        while (ended := self._ended.get()) is not None:
            try:
                self._make(ended.call, _parent(ended.traceparent), SpanKind.SERVER, ended.offset)
            except Exception:  # noqa: BLE001 - OpenTelemetry may raise anything; the next trace may succeed
                _log.exception("cannot create a trace")

    def _make(self, stage: "_Stage", parent: "Context", kind: "SpanKind", offset: int) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        start = offset + _nanoseconds(stage.start)
        span = self._tracer.start_span(stage.name, parent, kind, stage.attributes, start_time=start)
        if not span.is_recording():  # its children are not recorded either
            return
        if stage.error:
            span.set_status(Status(StatusCode.ERROR, stage.error))
        for part in stage.parts:
            self._make(part, set_span_in_context(span), SpanKind.INTERNAL, offset)
        span.end(offset + _nanoseconds(stage.end))


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _parent(traceparent: str) -> "Context":
    """The caller's span; empty if it sent none or a malformed one."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent}, Context())


def _attributes(record: Record) -> _Attributes:
    call, outcome, trace = record.call, record.outcome, record.trace
    verb, _, route = call.method.rpartition(" ")
    attributes: _Attributes = {"http.request.method": verb, "http.route": route} if verb else {"rpc.system.name": "grpc"}
    attributes |= {
        "rpc.method": call.method.lstrip("/"),
        "rpc.response.status_code": outcome.status,
        "img2img.request_id": call.request_id,
        "img2img.client": record.token,
    }
    if outcome.status != "OK":
        attributes["error.type"] = outcome.reason or outcome.status
    if trace is not None:
        request = trace.request
        attributes |= {
            "img2img.model": request.model,
            "img2img.width": request.result_size[0],
            "img2img.height": request.result_size[1],
            "img2img.pictures": len(request.seeds),
        }
        if trace.speedup:
            attributes["img2img.speedup"] = trace.speedup
    return attributes


def _stages(record: Record, trace: RequestTrace, ended: float) -> Iterator[_Stage]:
    """The stages of a call, in order. The stage in which the request failed has the error."""
    ticket = trace.ticket
    if ticket is None:  # refused
        yield _Stage("parse", record.began, ended)
        return
    yield _Stage("parse", record.began, ticket.arrival)
    over = ended if trace.ended is None else trace.ended
    starts = {"queue": ticket.arrival, "encode": ticket.started, "denoise": ticket.prepared, "decode": _denoised(trace, ticket)}
    begun = [(name, start) for name, start in starts.items() if 0 < start <= over]
    ends = [start for _, start in begun[1:]] + [over]
    for (name, start), end in zip(begun, ends, strict=True):
        stage = _Stage(name, start, end)
        _describe(stage, trace)
        if end == over:
            stage.error = trace.error or record.outcome.reason
        yield stage
    if over < ended:
        yield _Stage("respond", over, ended)


def _denoised(trace: RequestTrace, ticket: Ticket) -> float:
    """The end of the last step, 0 if there are steps left."""
    if trace.timings is not None:
        return ticket.prepared + trace.timings.denoise
    return trace.stepped if trace.step_count >= ticket.plan.step_count else 0.0


def _describe(stage: _Stage, trace: RequestTrace) -> None:
    """Adds a stage's attributes: the number of requests that shared it, and its steps."""
    shared = trace.codecs.get({"encode": "prepare", "decode": "finish"}.get(stage.name, ""))
    if shared is not None:
        stage.attributes["img2img.batch.requests"] = shared.requests
    if stage.name != "denoise":
        return
    stage.attributes["img2img.steps"] = trace.step_count
    for number, step in enumerate(trace.steps, start=1):
        about: _Attributes = {"img2img.step": number, "img2img.batch.requests": step.requests, "img2img.batch.rows": step.rows}
        stage.parts.append(_Stage("step", step.start, step.start + step.seconds, about))

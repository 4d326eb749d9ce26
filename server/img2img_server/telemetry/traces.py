"""Traces for OpenTelemetry: a span for each call, and below it where a transform's time went.

    img2img.v1.ImageToImageService/Transform
        parse       the source fetched and decoded, the model found (and loaded, where it was not in memory)
        queue       waiting for its first turn
        encode      prompt and image, with the requests that came with it
        denoise     from the first step to the last
            step    one call of the denoiser, with the requests that shared it; between two of them others had their turns
        decode
        respond     the images encoded, and whatever a slow reader kept waiting

A step is a span rather than an event of "denoise", since it has two ends: what lies between two steps is not this request's own.
The first trails.MOST_STEPS have one. The times are those of the engine, on its clock.

Everything is made when the call has ended, on a thread of its own: a span takes tens of microseconds. https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
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
"""Seconds that the collector gets at the end to take what is left."""
_EXPORT = 10.0
"""Seconds that it gets for one batch of spans."""
_MOST_WAITING = 1000
"""Calls that may wait for their traces to be made. Beyond, calls have none."""
_FAULTS = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
"""The statuses that are a server's failure by OpenTelemetry's conventions. The others are their callers'."""

_Attributes = dict[str, str | int | float]


@dataclass(slots=True)
class _Stage:
    """A span, a call's or one below. `error` is the reason of the failure that ended it. Times are of time.monotonic."""

    name: str
    start: float
    end: float
    attributes: _Attributes = field(default_factory=dict)
    error: str = ""
    parts: "list[_Stage]" = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Ended:
    """A call that has ended, and what to add to its times to have nanoseconds since 1970."""

    call: _Stage
    traceparent: str
    offset: int


class Traces:
    """Sends traces to the collector at `endpoint`, by OTLP over gRPC: http://... in plain text, https://... with TLS.

    OpenTelemetry's own variables count for what is not said here: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES,
    OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS. Raises ValueError where its packages are missing.
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

    def tell(self, record: Record, ended: float) -> None:
        """Has the trace made of a call that ended at `ended`, on time.monotonic. Waits for nothing."""
        offset = time.time_ns() - _nanoseconds(time.monotonic())  # one for all of a call's times: clocks are set now and then
        stages = list(_stages(record, record.trail, ended)) if record.trail is not None else []
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
        """Sends what is left, but gives the collector no more than a few seconds for it."""
        sending = threading.Thread(target=self._send_the_rest, name="img2img-traces-end", daemon=True)
        sending.start()
        sending.join(_FLUSH)
        if sending.is_alive():
            self._exporter.shutdown()  # breaks off the attempt that is under way; without it, there would be many more
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
            except Exception:  # noqa: BLE001 - whatever OpenTelemetry raises: the next call's trace may be made
                _log.exception("cannot create a trace")

    def _make(self, stage: "_Stage", parent: "Context", kind: "SpanKind", offset: int) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        start = offset + _nanoseconds(stage.start)
        span = self._tracer.start_span(stage.name, parent, kind, stage.attributes, start_time=start)
        if not span.is_recording():  # nor is what is below it
            return
        if stage.error:
            span.set_status(Status(StatusCode.ERROR, stage.error))
        for part in stage.parts:
            self._make(part, set_span_in_context(span), SpanKind.INTERNAL, offset)
        span.end(offset + _nanoseconds(stage.end))


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _parent(traceparent: str) -> "Context":
    """The caller's span; none where it sent none, or nonsense."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent}, Context())


def _attributes(record: Record) -> _Attributes:
    call, outcome, trail = record.call, record.outcome, record.trail
    attributes: _Attributes = {
        "rpc.system.name": "grpc",
        "rpc.method": call.method.lstrip("/"),
        "rpc.response.status_code": outcome.status,
        "img2img.request_id": call.request_id,
        "img2img.client": record.token,
    }
    if outcome.status != "OK":
        attributes["error.type"] = outcome.reason or outcome.status
    if trail is not None:
        request = trail.request
        attributes |= {
            "img2img.model": request.model,
            "img2img.width": request.image.width,
            "img2img.height": request.image.height,
            "img2img.pictures": len(request.seeds),
        }
    return attributes


def _stages(record: Record, trail: RequestTrace, ended: float) -> Iterator[_Stage]:
    """Where the call's time went, in order. The stage that was under way when the request failed has the error."""
    ticket = trail.ticket
    if ticket is None:  # refused
        yield _Stage("parse", record.began, ended)
        return
    yield _Stage("parse", record.began, ticket.arrival)
    over = ended if trail.ended is None else trail.ended
    starts = {"queue": ticket.arrival, "encode": ticket.started, "denoise": ticket.prepared, "decode": _denoised(trail, ticket)}
    begun = [(name, start) for name, start in starts.items() if 0 < start <= over]
    ends = [start for _, start in begun[1:]] + [over]
    for (name, start), end in zip(begun, ends, strict=True):
        stage = _Stage(name, start, end)
        _describe(stage, trail)
        if end == over:
            stage.error = trail.error or record.outcome.reason
        yield stage
    if over < ended:
        yield _Stage("respond", over, ended)


def _denoised(trail: RequestTrace, ticket: Ticket) -> float:
    """When the last of its steps was done, 0 where there are steps left."""
    if trail.timings is not None:
        return ticket.prepared + trail.timings.denoise
    return trail.stepped if trail.step_count >= ticket.plan.step_count else 0.0


def _describe(stage: _Stage, trail: RequestTrace) -> None:
    """Adds what is known of a stage: with how many others the request shared it, and the steps that it is made of."""
    shared = trail.codecs.get({"encode": "prepare", "decode": "finish"}.get(stage.name, ""))
    if shared is not None:
        stage.attributes["img2img.batch.requests"] = shared.requests
    if stage.name != "denoise":
        return
    stage.attributes["img2img.steps"] = trail.step_count
    for number, step in enumerate(trail.steps, start=1):
        about: _Attributes = {"img2img.step": number, "img2img.batch.requests": step.requests, "img2img.batch.rows": step.rows}
        stage.parts.append(_Stage("step", step.start, step.start + step.seconds, about))

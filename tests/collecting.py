"""A collector that records spans: OTLP over gRPC, on a free port."""

import contextlib
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc


@dataclass(frozen=True, slots=True)
class Told:
    """A received span. Times are in nanoseconds since 1970, ids in hex; `error` is the description of an error's status."""

    name: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    kind: int
    failed: bool
    error: str
    attributes: dict[str, Any]

    def holds(self, other: "Told") -> bool:
        """Whether the other lies within this one."""
        return self.start <= other.start <= other.end <= self.end


@dataclass(slots=True)
class Collector:
    """The spans received so far."""

    port: int = 0
    resources: list[dict[str, Any]] = field(default_factory=list)
    spans: list[Told] = field(default_factory=list)
    came: "queue.SimpleQueue[int]" = field(default_factory=queue.SimpleQueue)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def children(self, parent: Told) -> list[Told]:
        """The spans right below one, by their beginning."""
        return sorted((span for span in self.spans if span.parent == parent.id), key=lambda span: span.start)

    def named(self, name: str) -> Told:
        """The only span of that name."""
        (found,) = [span for span in self.spans if span.name == name]
        return found

    def keep(self, request: pb.ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            self.resources.append(_attributes(resource.resource.attributes))
            for scope in resource.scope_spans:
                self.spans += map(_told, scope.spans)
        self.came.put(len(self.spans))


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


def _told(span: Any) -> Told:
    return Told(
        name=span.name,
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        kind=span.kind,
        failed=span.status.code == span.status.STATUS_CODE_ERROR,
        error=span.status.message,
        attributes=_attributes(span.attributes),
    )


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """Collects while the block runs."""
    collector = Collector()

    class Service(pb_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> pb.ExportTraceServiceResponse:
            collector.keep(request)
            return pb.ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_TraceServiceServicer_to_server(Service(), server)  # type: ignore[no-untyped-call]
    collector.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector
    finally:
        server.stop(0).wait()

"""With OpenTelemetry each call is a client span in the server's trace; without it there is no overhead."""

import gc
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from blocking import Blocking
from fake_image_service import FakeServer, FakeService
from fake_statuses import error_info, queue_full, rich_status, unavailable
from google.rpc import code_pb2  # type: ignore[import-untyped, unused-ignore]
from img2img_client import Client, Img2ImgError, RetryPolicy
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id


@pytest.fixture(params=[Client, Blocking])
def client(request: pytest.FixtureRequest, server: FakeServer) -> Iterator[Any]:
    with request.param(server.target, timeout=120, retries=None) as made:
        yield made


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """The spans of a program with OpenTelemetry. Its provider is not the process's, which can be set only once."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


def only(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = exporter.get_finished_spans()
    return span


def traceparent(span: ReadableSpan) -> str:
    assert span.context is not None
    assert span.context.trace_flags.sampled
    ids = f"{format_trace_id(span.context.trace_id)}-{format_span_id(span.context.span_id)}"
    return f"00-{ids}-{span.context.trace_flags:02x}"


@pytest.mark.parametrize("streamed", [False, True])
def test_call_has_a_client_span_sent_as_traceparent(
    exporter: InMemorySpanExporter, client: Client, service: FakeService, streamed: bool
) -> None:
    list(client.transform_stream(b"file")) if streamed else client.transform(b"file")
    span = only(exporter)
    assert (span.name, span.kind) == ("img2img.transform_stream" if streamed else "img2img.transform", SpanKind.CLIENT)
    assert span.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": f"img2img.v1.ImageToImageService/{'TransformStream' if streamed else 'Transform'}",
        "rpc.response.status_code": "OK",
        "server.address": client.target,
        "img2img.request_id": "made",
    }
    assert span.status.status_code is StatusCode.UNSET
    assert service.metadata[0]["traceparent"] == traceparent(span)


def test_every_kind_of_call_has_its_name(exporter: InMemorySpanExporter, client: Client) -> None:
    client.models()
    client.delete_asset(client.upload(b"file"))
    names = [span.name for span in exporter.get_finished_spans()]
    assert names == ["img2img.list_models", "img2img.upload_asset", "img2img.delete_asset"]


def test_all_attempts_are_one_span(exporter: InMemorySpanExporter, server: FakeServer) -> None:
    server.service.failures = [unavailable(), queue_full(0.001)]
    with Client(server.target, timeout=120, retries=RetryPolicy(first_backoff=0.001)) as client:
        client.transform(b"file")
    span = only(exporter)
    assert [(event.name, dict(event.attributes or {})["reason"]) for event in span.events] == [
        ("retry", "SHUTTING_DOWN"),
        ("retry", "QUEUE_FULL"),
    ]
    assert {sent["traceparent"] for sent in server.service.metadata} == {traceparent(span)}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_failure_marks_the_span(exporter: InMemorySpanExporter, client: Client, service: FakeService, streamed: bool) -> None:
    service.failure = rich_status(code_pb2.INTERNAL, "failed", error_info("MODEL_FAILED", request_id="abc"))
    with pytest.raises(Img2ImgError):
        list(client.transform_stream(b"file")) if streamed else client.transform(b"file")
    span = only(exporter)
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "failed")
    attributes = span.attributes or {}
    assert (attributes["error.type"], attributes["img2img.request_id"]) == ("INTERNAL", "abc")
    assert attributes["rpc.response.status_code"] == "INTERNAL"


@pytest.mark.parametrize("leave", ["close", "drop"])
def test_leaving_a_stream_ends_its_span_once(exporter: InMemorySpanExporter, client: Client, leave: str) -> None:
    stream = client.transform_stream(b"file")
    next(stream)
    assert exporter.get_finished_spans() == ()
    if leave == "close":
        stream.close()
        stream.close()
    del stream
    gc.collect()
    span = only(exporter)
    assert span.status.status_code is StatusCode.UNSET
    assert (span.attributes or {})["rpc.response.status_code"] == "CANCELLED"


def test_a_call_belongs_to_the_span_around_it(exporter: InMemorySpanExporter, client: Client) -> None:
    with trace.get_tracer("test").start_as_current_span("around") as around:
        client.models()
    inner, outer = exporter.get_finished_spans()
    assert inner.parent == outer.context == around.get_span_context()


def test_without_a_provider_nothing_is_sent(client: Client, service: FakeService) -> None:
    client.transform(b"file")
    assert "opentelemetry.trace" in sys.modules
    assert "traceparent" not in service.metadata[0]


@pytest.mark.parametrize("hidden", [False, True], ids=["installed", "missing"])
def test_client_does_not_import_opentelemetry(server: FakeServer, hidden: bool) -> None:
    code = f"""
import sys
if {hidden}: sys.modules["opentelemetry"] = None
from img2img_client import Client
with Client("{server.target}", timeout=120) as client:
    client.transform(b"file")
    list(client.transform_stream(b"file"))
print([name for name, module in sys.modules.items() if name.startswith("opentelemetry") and module])
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")

"""Traces: the spans of a call at a collector; and telemetry never delays or fails calls."""

import itertools
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import grpc
import pytest
from collecting import Collector, collecting
from fakes import Clock, FakePipeline, make_request, run_out
from grpc_health.v1 import health_pb2, health_pb2_grpc
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1 import model_pb2, model_pb2_grpc
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server.config import TelemetrySettings
from img2img_server.engine.engine import Engine
from img2img_server.engine.interface import Span
from img2img_server.engine.request import UsedSpeedup
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.support.call import Call
from img2img_server.telemetry.request_traces import MOST_STEPS
from img2img_server.telemetry.telemetry import Telemetry
from messages import failure, request
from running import RunningServer, running, store

TRANSFORM = "img2img.v1.ImageToImageService/Transform"
STREAM = "img2img.v1.ImageToImageService/TransformStream"
_SERVER = 2
"""SPAN_KIND_SERVER"""


def traced(collector: Collector, pipeline: FakePipeline, **settings: Any) -> Any:
    """A server that sends its traces to the collector, all of them before it has stopped."""
    telemetry = TelemetrySettings(otlp_endpoint=collector.endpoint)
    return running(lambda: store(m=pipeline), telemetry=telemetry, **settings)


def stub_of(channel: grpc.Channel) -> ImageToImageServiceStub:
    return ImageToImageServiceStub(channel)


def connected(server: RunningServer) -> grpc.Channel:
    return grpc.insecure_channel(f"localhost:{server.port}")


def test_trace_of_a_transform_has_a_span_per_stage() -> None:
    pipeline, pause = FakePipeline(), 0.01
    pipeline.before_call = lambda: time.sleep(pause)  # a step takes real time
    with collecting() as collector:
        before = time.time_ns()
        with traced(collector, pipeline) as server, connected(server) as channel:
            metadata = (("x-request-id", "my-own"),)
            response = stub_of(channel).Transform(request(num_inference_steps=4, strength=1.0, image_count=2), metadata=metadata)
        after = time.time_ns()
    call = collector.named(TRANSFORM)
    assert (call.kind, call.parent, call.failed) == (_SERVER, "", False)
    assert call.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": TRANSFORM,
        "rpc.response.status_code": "OK",
        "img2img.request_id": "my-own",
        "img2img.client": "",
        "img2img.model": "m",
        "img2img.width": 24,
        "img2img.height": 16,
        "img2img.pictures": 2,
    }
    assert before <= call.start
    assert call.end <= after
    stages = collector.children(call)
    assert [stage.name for stage in stages] == ["parse", "queue", "encode", "denoise", "decode", "respond"]
    for stage, following in itertools.pairwise(stages):
        assert call.holds(stage)
        assert stage.end <= following.start + 1000, "one after the other, but for rounding"
    seconds = {stage.name: (stage.end - stage.start) / 1e9 for stage in stages}
    told = response.timings
    assert seconds["queue"] == pytest.approx(told.queue_ms / 1e3, abs=1e-5)
    assert seconds["encode"] == pytest.approx(told.encode_ms / 1e3, abs=1e-5)
    assert seconds["denoise"] == pytest.approx(told.denoise_ms / 1e3, abs=1e-5)
    assert sum(seconds.values()) == pytest.approx((call.end - call.start) / 1e9, rel=0.01)
    denoise = stages[3]
    steps = collector.children(denoise)
    assert [step.attributes["img2img.step"] for step in steps] == [1, 2, 3, 4]
    assert all(denoise.holds(step) and step.end - step.start >= pause * 1e9 for step in steps)
    assert all(step.name == "step" and step.attributes["img2img.batch.rows"] == 2 for step in steps)
    assert {span.trace for span in collector.spans} == {call.trace}
    assert collector.resources[0]["service.name"] == "img2img"


def test_a_span_names_the_speedup_of_its_request() -> None:
    pipeline = FakePipeline()
    pipeline.speedup = UsedSpeedup("guidance kept", 1.5, 33.0, 0.97)
    with collecting() as collector, traced(collector, pipeline) as server, connected(server) as channel:
        stub_of(channel).Transform(request(fidelity=pb.Fidelity(level=pb.FIDELITY_LEVEL_FAST)))
    assert collector.named(TRANSFORM).attributes["img2img.speedup"] == "guidance kept"


def test_requests_that_share_a_step_each_have_a_span_for_it() -> None:
    """Request ids may be equal, since callers choose them: neither request's trace contains the other's spans."""
    pipeline, inside, leave = FakePipeline(), threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        leave.wait(60)

    pipeline.before_call = hold
    with collecting() as collector, traced(collector, pipeline) as server, connected(server) as channel:
        metadata = (("x-request-id", "twin"),)
        first = stub_of(channel).Transform.future(request(num_inference_steps=5, strength=1.0), metadata=metadata)
        assert inside.wait(60)
        stream = stub_of(channel).TransformStream(
            pb.TransformStreamRequest(request=request(num_inference_steps=3, strength=1.0)), metadata=metadata
        )
        assert next(stream).HasField("queued")
        leave.set()
        first.result(60)
        list(stream)
    long, short = (
        [step for stage in collector.children(collector.named(name)) for step in collector.children(stage)]
        for name in (TRANSFORM, STREAM)
    )
    assert (len(long), len(short)) == (5, 3)
    assert sum(step.attributes["img2img.batch.requests"] == 2 for step in long) == len(
        [step for step in short if step.attributes["img2img.batch.requests"] == 2]
    )
    assert long[0].attributes["img2img.batch.requests"] == 1, "it was alone when it began"


def test_trace_continues_the_callers_trace() -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with collecting() as collector, traced(collector, FakePipeline()) as server, connected(server) as channel:
        for flags in ("01", "00"):  # 00: the caller does not sample it
            metadata = (("traceparent", f"00-{trace}-{parent}-{flags}"),)
            stub_of(channel).Transform(request(), metadata=metadata)
    call = collector.named(TRANSFORM)
    assert (call.trace, call.parent) == (trace, parent)
    assert {span.trace for span in collector.spans} == {trace}


@pytest.mark.parametrize("traceparent", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 5000])
def test_invalid_traceparent_starts_a_new_trace(traceparent: str) -> None:
    with collecting() as collector, traced(collector, FakePipeline()) as server, connected(server) as channel:
        stub_of(channel).Transform(request(), metadata=(("traceparent", traceparent),))
    assert collector.named(TRANSFORM).parent == ""


@pytest.mark.parametrize(
    ("trouble", "stage"), [("fail prepare", "encode"), ("fail denoise", "denoise"), ("fail finish", "decode")]
)
def test_error_marks_the_span_of_the_call_and_of_its_stage(trouble: str, stage: str) -> None:
    with collecting() as collector, traced(collector, FakePipeline()) as server, connected(server) as channel:
        failure(lambda: stub_of(channel).Transform(request(prompt=trouble, num_inference_steps=4)))
    call = collector.named(TRANSFORM)
    assert (call.failed, call.error) == (True, "MODEL_FAILED")
    assert call.attributes["rpc.response.status_code"] == "INTERNAL"
    assert call.attributes["error.type"] == "MODEL_FAILED"
    stages = [span for span in collector.children(call) if span.name != "respond"]
    assert [(span.name, span.error) for span in stages if span.failed] == [(stage, "MODEL_FAILED")]
    assert stages[-1].name == stage
    assert all(call.holds(span) for span in collector.children(call))


def test_client_errors_are_reported_and_are_not_server_errors() -> None:
    with collecting() as collector, traced(collector, FakePipeline()) as server, connected(server) as channel:
        failure(lambda: stub_of(channel).Transform(request(strength=2.0)))
    call = collector.named(TRANSFORM)
    assert not call.failed
    assert call.attributes["error.type"] == "INVALID_FIELD"
    assert collector.children(call) == []


def test_refused_and_cancelled_requests_have_a_trace() -> None:
    pipeline, inside, leave = FakePipeline(), threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        leave.wait(60)

    pipeline.before_call = hold
    with collecting() as collector:
        limits = QueueLimits(max_active=1, max_waiting=1)
        with traced(collector, pipeline, limits=limits) as server, connected(server) as channel:
            first = stub_of(channel).Transform.future(request())
            assert inside.wait(60)
            waiting = stub_of(channel).TransformStream(pb.TransformStreamRequest(request=request()))
            assert next(waiting).HasField("queued")
            _, refused = failure(lambda: stub_of(channel).Transform(request()))
            assert refused["reason"] == "QUEUE_FULL"
            waiting.cancel()
            leave.set()
            first.result(60)
    given_up = collector.named(STREAM)
    assert given_up.attributes["rpc.response.status_code"] == "CANCELLED"
    assert [stage.name for stage in collector.children(given_up)][:2] == ["parse", "queue"]
    assert all(given_up.holds(stage) for stage in collector.children(given_up))
    (refused_call,) = [span for span in collector.spans if span.attributes.get("error.type") == "QUEUE_FULL"]
    assert refused_call.attributes["rpc.response.status_code"] == "RESOURCE_EXHAUSTED"


def test_many_steps_have_spans_up_to_a_bound() -> None:
    steps = MOST_STEPS + 20
    with (
        collecting() as collector,
        traced(collector, FakePipeline(), max_steps=steps) as server,
        connected(server) as channel,
    ):
        stub_of(channel).Transform(request(num_inference_steps=steps, strength=1.0))
    denoise = collector.named("denoise")
    assert denoise.attributes["img2img.steps"] == steps
    assert len(collector.children(denoise)) == MOST_STEPS


def test_every_call_except_health_checks_has_a_span() -> None:
    with collecting() as collector, traced(collector, FakePipeline()) as server, connected(server) as channel:
        model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())
        health: Any = health_pb2_grpc.HealthStub(channel)
        health.Check(health_pb2.HealthCheckRequest())
    assert [span.name for span in collector.spans] == ["img2img.v1.ModelService/ListModels"]


def test_unresponsive_collector_delays_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector accepts connections but never answers. Calls are answered and the server stops, although an export would be
    retried for an hour."""
    monkeypatch.setattr("img2img_server.telemetry.traces._EXPORT", 3600.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        telemetry = TelemetrySettings(otlp_endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        with running(lambda: store(m=FakePipeline()), telemetry=telemetry) as server, connected(server) as channel:
            for _ in range(3):
                stub_of(channel).Transform(request())


def test_missing_packages_are_named_before_any_model_is_loaded() -> None:
    code = """
import sys
sys.modules["opentelemetry.sdk.trace"] = None
sys.path.insert(0, "tests")
from running import running
from img2img_server.config import TelemetrySettings
from img2img_server.engine.request import UsedSpeedup
try:
    with running(lambda: print("loaded"), telemetry=TelemetrySettings(otlp_endpoint="http://localhost:4317")):
        pass
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    told = "otlp_endpoint needs 'opentelemetry.sdk.trace': pip install 'img2img-server[telemetry]'\n"
    assert (result.stdout, result.returncode) == (told, 0), result.stderr


def test_call_state_is_released_when_the_call_ends() -> None:
    with collecting() as collector:
        telemetry = Telemetry(TelemetrySettings(otlp_endpoint=collector.endpoint))
        telemetry.start()
        try:
            for _ in range(3):
                with telemetry.call(Call(f"/{TRANSFORM}", "r")):
                    asked = make_request()
                    trace = telemetry.trace(asked)
                    telemetry.span(Span("denoise", "m", 1, 1, 0.0, 1.0, (asked,)))
                    assert trace.step_count == 1
                telemetry.span(Span("denoise", "m", 1, 1, 0.0, 1.0, (asked,)))
                assert trace.step_count == 1
            telemetry.trace(make_request())  # of no call
            assert not telemetry._request_traces
        finally:
            telemetry.close()


def test_engine_spans_name_their_requests() -> None:
    spans: list[Span] = []
    clock = Clock()
    engine = Engine({"m": FakePipeline(clock)}, clock=clock, observe=spans.append)
    requests = [make_request(num_inference_steps=2), make_request(num_inference_steps=3)]
    for one in requests:
        engine.submit(one, lambda event: None)
    run_out(engine)
    assert all(len(span.members) == span.requests for span in spans)
    stepped = [sum(member is one for span in spans if span.stage == "denoise" for member in span.members) for one in requests]
    assert stepped == [2, 3]


def test_spans_are_exported_only_after_the_request_ends() -> None:
    """The engine's thread neither creates nor sends spans: the collector gets them after the call has ended."""
    pipeline, inside, leave = FakePipeline(), threading.Event(), threading.Event()

    def hold() -> None:
        if len(pipeline.batches) == 3:
            inside.set()
            leave.wait(60)

    pipeline.before_call = hold
    with collecting() as collector, traced(collector, pipeline) as server, connected(server) as channel:
        stream = stub_of(channel).TransformStream(pb.TransformStreamRequest(request=request(num_inference_steps=8)))
        assert inside.wait(60)
        server.server._telemetry._traces._provider.force_flush()
        assert collector.spans == []
        leave.set()
        list(stream)
        server.stop().result(60)
        assert collector.named(STREAM)

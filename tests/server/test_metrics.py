"""Metrics count what happened, have bounded labels, and are all documented."""

import math
import socket
import threading
import urllib.error
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from conftest import REPOSITORY
from fakes import FakePipeline
from grpc_health.v1 import health_pb2, health_pb2_grpc
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server.config import TelemetrySettings
from img2img_server.models.registry import Model, ModelRegistry
from img2img_server.telemetry import metrics
from img2img_server.telemetry.metrics import ASKED, COUNTED, PROCESS
from messages import failure, request
from running import RunningServer, running, store
from scraping import fetch, scrape, settled, value

TRANSFORM = "ImageToImageService/Transform"
FREE_PORT = TelemetrySettings(metrics_port=0)


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def server(pipeline: FakePipeline) -> Iterator[RunningServer]:
    with running(lambda: store(m=pipeline, other=FakePipeline()), telemetry=FREE_PORT) as server:
        yield server


@pytest.fixture
def stub(server: RunningServer) -> Iterator[ImageToImageServiceStub]:
    with grpc.insecure_channel(f"localhost:{server.port}") as channel:
        yield ImageToImageServiceStub(channel)


def port_of(server: RunningServer) -> int:
    port = server.server.metrics_port
    assert port
    return port


def test_calls_are_counted_by_status_and_reason(server: RunningServer, stub: ImageToImageServiceStub) -> None:
    stub.Transform(request())
    stub.Transform(request())
    failure(lambda: stub.Transform(request(strength=2.0)))
    failure(lambda: stub.Transform(request(prompt="fail denoise")))
    list(stub.TransformStream(pb.TransformStreamRequest(request=request())))
    samples = settled(port_of(server))

    def count(**labels: str) -> float:
        return value(samples, "img2img_requests_total", **labels)

    assert count(method=TRANSFORM, status="OK", reason="", client="") == 2
    assert count(method=TRANSFORM, status="INVALID_ARGUMENT", reason="INVALID_FIELD") == 1
    assert count(method=TRANSFORM, status="INTERNAL", reason="MODEL_FAILED") == 1
    assert count(method="ImageToImageService/TransformStream", status="OK") == 1
    assert count() == value(samples, "img2img_call_duration_seconds_count") == 5
    assert value(samples, "img2img_calls_in_progress") == 0


def test_stage_durations_and_model_calls_are_counted(server: RunningServer, stub: ImageToImageServiceStub) -> None:
    stub.Transform(request(num_inference_steps=5, strength=1.0, image_count=3))
    samples = scrape(port_of(server))
    for stage in ("queue", "encode", "denoise", "decode", "total"):
        assert value(samples, "img2img_transform_stage_duration_seconds_count", model="m", stage=stage) == 1
    stages = [
        value(samples, "img2img_transform_stage_duration_seconds_sum", model="m", stage=stage)
        for stage in ("queue", "encode", "denoise", "decode")
    ]
    total = value(samples, "img2img_transform_stage_duration_seconds_sum", model="m", stage="total")
    assert 0 < sum(stages) <= total
    assert value(samples, "img2img_pictures_total", model="m") == 3
    calls = [
        value(samples, "img2img_device_call_duration_seconds_count", model="m", stage=stage)
        for stage in ("prepare", "denoise", "advance", "finish")
    ]
    assert calls == [1, 5, 5, 1]
    assert value(samples, "img2img_batch_rows_sum", model="m") == 5 * 3
    assert value(samples, "img2img_batch_requests_sum", model="m") == 5
    assert not any(labels.get("model") == "other" for labels, _ in samples["img2img_batch_rows_count"]), "nobody asked it"


def test_queue_metrics_match_the_engine(server: RunningServer, stub: ImageToImageServiceStub, pipeline: FakePipeline) -> None:
    """While the model is in a call, one request is active, the others wait, and metrics are served all the same."""
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        leave.wait(60)

    pipeline.before_call = hold
    try:
        calls = [stub.Transform.future(request())]
        assert inside.wait(60)
        streams = [stub.TransformStream(pb.TransformStreamRequest(request=request())) for _ in range(2)]
        for stream in streams:
            assert next(stream).HasField("queued")
        samples = scrape(port_of(server))
        assert value(samples, "img2img_engine_active_requests") == 1
        assert value(samples, "img2img_engine_waiting_requests") == 2
        assert value(samples, "img2img_engine_call_seconds") > 0
        assert value(samples, "img2img_calls_in_progress", method=TRANSFORM) == 1
        assert value(samples, "img2img_calls_in_progress", method="ImageToImageService/TransformStream") == 2
    finally:
        leave.set()
    calls[0].result(60)
    for stream in streams:
        list(stream)
    samples = scrape(port_of(server))
    assert value(samples, "img2img_engine_active_requests") + value(samples, "img2img_engine_waiting_requests") == 0


def test_unknown_work_seconds_are_reported_as_nan() -> None:
    with running(lambda: store(m=FakePipeline()), telemetry=FREE_PORT) as server:
        ((_, work),) = scrape(port_of(server))["img2img_engine_work_seconds"]
        assert math.isnan(work) or work == 0


def test_models_are_listed_with_state_and_engine(server: RunningServer) -> None:
    samples = scrape(port_of(server))
    states = {labels["state"]: told for labels, told in samples["img2img_model_state"] if labels["model"] == "m"}
    assert states == {"unloaded": 0, "loading": 0, "ready": 1, "failed": 0}
    assert value(samples, "img2img_model_info", model="m", engine="fake:cpu", backend="onnx", precision="fp32") == 1


def test_health_check_of_an_unknown_service_is_not_a_server_error(server: RunningServer) -> None:
    with grpc.insecure_channel(f"localhost:{server.port}") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError):
            health.Check(health_pb2.HealthCheckRequest(service="models/nope"))
    samples = settled(port_of(server))
    assert value(samples, "img2img_requests_total", method="Health/Check", status="NOT_FOUND") == 1


def test_occupied_port_is_an_error_before_any_model_is_loaded() -> None:
    loaded: list[str] = []

    def load() -> ModelRegistry:
        loaded.append("m")
        return store(m=FakePipeline())

    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = TelemetrySettings(metrics_port=taken.getsockname()[1])
        with pytest.raises(OSError, match="in use"), running(load, telemetry=settings):
            pass
    assert loaded == []


def test_metrics_port_is_released_after_stop_or_failed_start() -> None:
    with running(lambda: store(m=FakePipeline()), telemetry=FREE_PORT) as server:
        port = port_of(server)
        assert fetch(port)
    with pytest.raises(urllib.error.URLError):
        fetch(port)

    def fail() -> None:
        raise OSError("no such folder")

    settings = TelemetrySettings(metrics_port=port)
    with pytest.raises(OSError, match="no such folder"), running(fail, telemetry=settings):  # type: ignore[arg-type]
        pass
    with running(lambda: store(m=FakePipeline()), telemetry=settings) as server:
        assert fetch(port_of(server))


def test_without_a_port_metrics_are_not_served() -> None:
    with running(lambda: store(m=FakePipeline())) as server:
        assert server.server.metrics_port is None


def test_servers_in_one_process_have_separate_metrics() -> None:
    with (
        running(lambda: store(m=FakePipeline()), telemetry=FREE_PORT) as one,
        running(lambda: store(m=FakePipeline()), telemetry=FREE_PORT) as other,
    ):
        with grpc.insecure_channel(f"localhost:{one.port}") as channel:
            ImageToImageServiceStub(channel).Transform(request())
        assert value(scrape(port_of(one)), "img2img_requests_total") == 1
        assert value(scrape(port_of(other)), "img2img_requests_total") == 0


def test_served_metrics_match_their_descriptions(server: RunningServer, stub: ImageToImageServiceStub) -> None:
    """Every family with its kind and labels, and no others. The exception is a GPU's memory, since there is no GPU here."""
    stub.Transform(request())
    described = {about.name: about for about in (*COUNTED, *ASKED, *PROCESS)}
    served = scrape(port_of(server))
    types_of = dict(line.split()[2:] for line in fetch(port_of(server)).splitlines() if line.startswith("# TYPE"))
    without_samples = {"img2img_device_memory_free_bytes", "img2img_device_memory_total_bytes"}
    without_samples |= {name for name in described if name.startswith("img2img_cache_")}  # the fake has no cache
    for name, about in described.items():
        if name not in without_samples:
            assert types_of[name] == about.kind
            samples = served[f"{name}_count" if about.kind == "histogram" else name]
            assert all(set(labels) == set(about.labels) for labels, _ in samples), name
    assert set(types_of) <= set(described)


def test_the_documentation_has_every_metric() -> None:
    """The table between the markers is metrics.describe(); print that to mend it."""
    text = (REPOSITORY / "docs" / "monitoring.md").read_text(encoding="utf-8")
    _, begun, rest = text.partition("<!-- metrics -->\n")
    table, ended, _ = rest.partition("\n<!-- /metrics -->")
    assert begun
    assert ended
    assert table == metrics.describe()


def test_unservable_models_are_reported_as_failed() -> None:
    models = store(m=FakePipeline())
    models = type(models)([*models, Model("broken", problem="checksum")], default="m")
    with running(lambda: models, telemetry=FREE_PORT) as server:
        samples = scrape(port_of(server))
    states = {labels["state"]: told for labels, told in samples["img2img_model_state"] if labels["model"] == "broken"}
    assert states == {"unloaded": 0, "loading": 0, "ready": 0, "failed": 1}
    assert not any(labels["model"] == "broken" for labels, _ in samples["img2img_model_info"])

"""Envoy's configuration for browsers (gRPC-Web), by Envoy itself in front of a server."""

import contextlib
import http.client
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes import FakePipeline
from google.rpc import error_details_pb2
from granting import grant
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from img2img.v1 import image_to_image_pb2 as pb
from img2img_server.config import ServerConfig, TlsSettings
from kserve_calls import Gate, ending
from messages import request
from other_clients import PATIENCE
from PIL import Image, ImageChops
from proxying import CONFIG, ORIGIN, SERVICE, WebCall, certify, framed, proxied, with_options
from running import RunningServer, running, store


@pytest.fixture(scope="module")
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture(scope="module")
def server(pipeline: FakePipeline) -> Iterator[RunningServer]:
    with running(lambda: store(m=pipeline)) as made:
        yield made


@pytest.fixture(scope="module")
def port(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with proxied(server.port, tmp_path_factory.mktemp("envoy")) as made:
        yield made


@pytest.fixture
def gate(pipeline: FakePipeline) -> Iterator[Gate]:
    made = Gate(pipeline)
    yield made
    made.open()
    pipeline.before_call = lambda: None


def streamed(**fields: Any) -> bytes:
    return framed(pb.TransformStreamRequest(request=request(**fields)))


@pytest.mark.parametrize("text", [False, True], ids=["binary", "text"])
def test_an_image_is_transformed(port: int, text: bool) -> None:
    body = framed(request(seed=7))
    call = WebCall(port, f"{SERVICE}Transform", body, {"X-Request-Id": "order-4711"}, text=text)
    (answer,) = call
    assert (call.http_status, call.status) == (200, 0)
    assert pb.TransformResponse.FromString(answer).images[0].seed == 7
    assert call.headers["x-request-id"] == "order-4711"
    assert call.headers["access-control-allow-origin"] == ORIGIN
    exposed = call.headers["access-control-expose-headers"].split(", ")
    assert {"grpc-status", "grpc-message", "grpc-status-details-bin", "x-request-id"} <= set(exposed)


@pytest.mark.parametrize("text", [False, True], ids=["binary", "text"])
def test_events_of_a_stream_arrive_one_by_one(port: int, gate: Gate, text: bool) -> None:
    """The pipeline is held until the events before have arrived."""
    call = WebCall(port, f"{SERVICE}TransformStream", streamed(num_inference_steps=5), text=text)
    events = (pb.TransformStreamResponse.FromString(message) for message in call)
    kinds = []
    while (event := next(events)).WhichOneof("event") != "started":
        kinds.append(event.WhichOneof("event"))
    assert set(kinds) <= {"queued"}
    for step in range(1, 5):
        gate.wait_for_call()
        gate.step()
        assert next(events).progress.step == step
    assert next(events).WhichOneof("event") == "completed"
    assert list(events) == []
    assert call.status == 0


@pytest.mark.parametrize("method", ["Transform", "TransformStream"])
def test_an_error_names_the_field(port: int, method: str) -> None:
    wrong = request(strength=2.0)
    call = WebCall(
        port, f"{SERVICE}{method}", framed(wrong if method == "Transform" else pb.TransformStreamRequest(request=wrong))
    )
    assert list(call) == []
    assert (call.http_status, call.status) == (200, 3)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    found = [detail.Unpack(info) or detail.Unpack(bad) for detail in call.details.details]
    assert found
    assert (info.reason, bad.field_violations[0].field) == ("INVALID_FIELD", "strength")


def test_oversized_message_gets_a_status(port: int) -> None:
    large = framed(request(prompt="x" * (ServerConfig(Path()).max_message_bytes + 1)))
    call = WebCall(port, f"{SERVICE}Transform", large)
    assert list(call) == []
    assert (call.http_status, call.status) == (200, 8)
    assert "larger than max" in call.trailers["grpc-message"]


def test_deadline_is_enforced(port: int, pipeline: FakePipeline) -> None:
    for seconds in (2, 8, 32):
        gate = Gate(pipeline)
        call = WebCall(port, f"{SERVICE}TransformStream", streamed(), {"Grpc-Timeout": f"{seconds}S"})
        events = len(list(call))
        gate.open()
        assert call.status == 4
        if events >= 2:
            break
        # After this call the device is free for another try.
        assert len(list(WebCall(port, f"{SERVICE}Transform", framed(request())))) == 1
    assert events >= 2, "queued and started"


def test_disconnect_frees_the_engine(tmp_path: Path) -> None:
    pipeline = FakePipeline()
    gate = Gate(pipeline)
    with running(lambda: store(m=pipeline)) as server, proxied(server.port, tmp_path) as port, ending() as calls:
        call = WebCall(port, f"{SERVICE}TransformStream", streamed(num_inference_steps=25))
        for message in call:
            if pb.TransformStreamResponse.FromString(message).WhichOneof("event") == "started":
                break
        gate.wait_for_call()
        call.close()
        assert calls.wait("TransformStream") == "CANCELLED"
        gate.open()
        # The engine is free for the next caller's request of one step.
        assert len(list(WebCall(port, f"{SERVICE}Transform", framed(request(num_inference_steps=2))))) == 1
    assert len(pipeline.batches) <= 2


def preflight(port: int, origin: str, host: str = "localhost") -> http.client.HTTPResponse:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
        asked = "authorization,content-type,grpc-timeout,x-grpc-web,x-user-agent"
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": asked}
        connection.request("OPTIONS", f"{SERVICE}Transform", headers={"Host": f"{host}:{port}", **headers})
        response = connection.getresponse()
        response.read()
        return response


def test_cors_allows_only_the_configured_origin(port: int) -> None:
    allowed = preflight(port, ORIGIN)
    assert (allowed.status, allowed.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert allowed.headers["access-control-allow-methods"] == "POST, OPTIONS"
    assert {"authorization", "content-type", "grpc-timeout", "x-grpc-web", "x-user-agent"} <= set(
        allowed.headers["access-control-allow-headers"].split(", ")
    )
    for origin in ("http://evil.example", "http://localhost:3001", "https://localhost:3000", "null"):
        assert preflight(port, origin).headers["access-control-allow-origin"] is None
    assert preflight(port, ORIGIN, "evil.example").status == 404, "a name that someone pointed at this machine"


def test_other_paths_are_not_served(port: int) -> None:
    for path in ("/", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "/metrics"):
        call = WebCall(port, path, b"")
        assert call.headers.get("grpc-status") == "12" or call.http_status == 404
        call.close()


def test_unready_server_is_unavailable(tmp_path: Path) -> None:
    with running(lambda: store(m=FakePipeline())) as gone:
        pass
    with proxied(gone.port, tmp_path) as port:
        call = WebCall(port, f"{SERVICE}Transform", framed(request()))
        assert list(call) == []
        assert call.status == 14


def test_images_larger_than_the_buffers_are_forwarded(port: int) -> None:
    buffer = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["static_resources"]["listeners"][0][
        "per_connection_buffer_limit_bytes"
    ]
    noise = Image.frombytes("RGB", (1024, 1024), random.Random(1).randbytes(3 * 1024 * 1024))
    file = io.BytesIO()
    noise.save(file, "PNG")
    assert file.tell() > 2 * buffer
    body = framed(pb.TransformRequest(image=pb.ImageSource(data=file.getvalue()), num_inference_steps=2))
    (answer,) = WebCall(port, f"{SERVICE}Transform", body)
    made = pb.TransformResponse.FromString(answer).images[0].data
    assert len(made) > 2 * buffer
    # The fake model returns its source.
    assert ImageChops.difference(Image.open(io.BytesIO(made)), noise).getbbox() is None


def test_tokens_are_forwarded(tmp_path: Path) -> None:
    token = grant(tmp_path / "tokens.toml", "alice")
    with (
        running(lambda: store(m=FakePipeline()), tokens=tmp_path / "tokens.toml") as server,
        proxied(server.port, tmp_path) as port,
    ):
        for headers, status in (({}, 16), ({"Authorization": "Bearer wrong"}, 16), ({"Authorization": f"Bearer {token}"}, 0)):
            call = WebCall(port, f"{SERVICE}Transform", framed(request()), headers)
            assert len(list(call)) == (status == 0)
            assert call.status == status
        health = WebCall(port, "/grpc.health.v1.Health/Check", framed(HealthCheckRequest()))
        assert [HealthCheckResponse.FromString(message).status for message in health] == [HealthCheckResponse.SERVING]


def test_draining_server_finishes_streams_and_gets_no_new_calls(tmp_path: Path) -> None:
    pipeline = FakePipeline()
    gate = Gate(pipeline)
    with running(lambda: store(m=pipeline)) as server, proxied(server.port, tmp_path) as port:
        call = WebCall(port, f"{SERVICE}TransformStream", streamed(num_inference_steps=5))
        gate.wait_for_call()
        stopped = server.stop()
        # Begins to drain on the event loop, which then serves the next call.
        for _ in range(1000):
            refused = WebCall(port, "/grpc.health.v1.Health/Check", framed(HealthCheckRequest()))
            answers = [HealthCheckResponse.FromString(message).status for message in refused]
            if answers != [HealthCheckResponse.SERVING]:
                break
        refused = WebCall(port, f"{SERVICE}Transform", framed(request()))
        assert list(refused) == []
        assert refused.status == 14
        gate.open()
        events = [pb.TransformStreamResponse.FromString(message).WhichOneof("event") for message in call]
        assert (events[-1], call.status) == ("completed", 0)
        stopped.result(PATIENCE)


def test_the_options_add_tls_on_both_sides(tmp_path: Path) -> None:
    context = certify(tmp_path)
    tls = TlsSettings(tmp_path / "server.pem", tmp_path / "server.key")
    with running(lambda: store(m=FakePipeline()), tls=tls) as server, proxied(server.port, tmp_path, options=True) as port:
        call = WebCall(port, f"{SERVICE}Transform", framed(request()), tls=context)
        assert len(list(call)) == 1
        assert call.status == 0


def test_envoy_listens_on_loopback_and_unread_streams_block_no_others() -> None:
    for text in (CONFIG.read_text(encoding="utf-8"), with_options(CONFIG.read_text(encoding="utf-8"))):
        config = yaml.safe_load(text)["static_resources"]
        assert [listener["address"]["socket_address"]["address"] for listener in config["listeners"]] == ["127.0.0.1"]
        (cluster,) = config["clusters"]
        (options,) = cluster["typed_extension_protocol_options"].values()
        http2 = options["explicit_http_config"]["http2_protocol_options"]
        assert http2["max_concurrent_streams"] * http2["initial_stream_window_size"] < http2["initial_connection_window_size"]

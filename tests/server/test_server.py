"""Health, reflection, the port, and draining of a server."""

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from fakes import FakePipeline
from grpc_health.v1 import health_pb2, health_pb2_grpc
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_client import Client
from img2img_server.api.server import Server
from img2img_server.backends.local import LocalBackend
from img2img_server.config import ServerConfig
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.images import ImageLimits
from messages import failure, request
from PIL import Image
from running import running, store

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
IMAGE = Image.new("RGB", (64, 64), "teal")


def _health(channel: grpc.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)  # its stubs for mypy know no methods


def test_health_is_reported_for_server_service_and_models() -> None:
    with (
        running(lambda: store(m=FakePipeline())) as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        health = _health(channel)
        for name in ("", "img2img.v1.ImageToImageService", "models/m"):
            assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            health.Check(health_pb2.HealthCheckRequest(service="models/nope"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("version", ["grpc-v1", "grpc-v1alpha"])
def test_buf_curl_works_by_reflection_alone(version: str) -> None:
    """buf, a Go program, lists a method and calls it, with nothing but the address."""
    with running(lambda: store(m=FakePipeline())) as server:
        buf = [str(Path(sys.executable).parent / "buf"), "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
        url = f"http://localhost:{server.port}"
        buf += ["--reflect-protocol", version]
        methods = subprocess.run([*buf, "--list-methods", url], capture_output=True, text=True, timeout=60, check=True).stdout
        assert "img2img.v1.ImageToImageService/TransformStream" in methods
        call = [*buf, f"{url}/img2img.v1.ModelService/ListModels"]
        assert '"id": "m"' in subprocess.run(call, capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_second_server_on_the_port_is_an_error() -> None:
    with running(lambda: store(m=FakePipeline())) as server:
        config = ServerConfig(Path(), port=server.port)
        second = Server(config, LocalBackend(config, lambda: store(m=FakePipeline())))

        async def start() -> None:
            try:
                await second.start()
            finally:
                await second.stop()

        with pytest.raises(OSError, match=rf"port: 127.0.0.1:{server.port} is in use"):
            asyncio.run(start())


def test_draining_finishes_running_requests_and_refuses_new_ones() -> None:
    pipeline = FakePipeline()
    go, called = threading.Event(), threading.Event()

    def wait() -> None:
        called.set()
        assert go.wait(120)

    pipeline.before_call = wait
    with (
        running(lambda: store(m=pipeline)) as server,
        Client(f"localhost:{server.port}", timeout=60) as client,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        stream = client.transform_stream(IMAGE)
        assert called.wait(120)
        watch = _health(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        stopping = server.stop()
        assert next(watch).status == NOT_SERVING
        assert _refusal(channel) == grpc.StatusCode.UNAVAILABLE
        go.set()
        events = list(stream)
        stopping.result(60)
    assert type(events[-1]).__name__ == "Completed"


def _refusal(channel: grpc.Channel) -> grpc.StatusCode:
    """The error of new requests. Health changes first; a moment later no request is accepted."""
    code, details = failure(lambda: _submit_until_refused(ImageToImageServiceStub(channel)))
    assert details["reason"] == "SHUTTING_DOWN"
    return code


def _submit_until_refused(stub: ImageToImageServiceStub) -> None:
    for _ in range(100):
        call = stub.TransformStream(pb.TransformStreamRequest(request=request()), timeout=120)
        next(call)
        call.cancel()


@pytest.mark.parametrize(
    "settings",
    [{"port": -1}, {"port": 65536}, {"grace": -1.0}, {"max_steps": 0}, {"max_image_count": 0},
     {"limits": QueueLimits(max_batch_size=0)}, {"image_limits": ImageLimits(max_bytes=0)}],
)  # fmt: skip
def test_invalid_setting_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"the (minimum|maximum) is"):
        ServerConfig(Path(), **settings)  # type: ignore[arg-type]


def test_a_message_above_the_limit_is_refused_by_grpc_itself() -> None:
    with (
        running(lambda: store(m=FakePipeline()), image_limits=ImageLimits(max_bytes=1000)) as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        huge = pb.TransformRequest(image=pb.ImageSource(data=bytes(2 * 2**20)))
        with pytest.raises(grpc.RpcError) as caught:
            ImageToImageServiceStub(channel).Transform(huge)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def _serve(models: Path, port_file: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "img2img_server", "--models", str(models), "--port", "0", "--port-file", str(port_file)]
    command += ["--warm-up", "0"]
    with log.open("wb") as file:
        return subprocess.Popen(command, stderr=file)


def test_sigterm_lets_a_running_request_finish_and_exits_with_0(tmp_path: Path, bundle: Callable[[str], Path]) -> None:
    """The real process, from start to SERVING to SIGTERM in the middle of a request."""
    port_file, log = tmp_path / "port", tmp_path / "log"
    process = _serve(bundle("demo"), port_file, log)
    try:
        while not port_file.exists():
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        with Client(f"localhost:{port_file.read_text().strip()}", timeout=120) as client:
            events = iter(client.transform_stream(IMAGE, num_inference_steps=50, strength=1.0))
            while type(next(events)).__name__ != "Progress":
                pass
            process.send_signal(signal.SIGTERM)
            rest = [type(event).__name__ for event in events]
        assert rest[-1] == "Completed"
        assert process.wait(60) == 0
        assert not port_file.exists()
        assert "drained" in log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("models", "why"), [("empty", "has no bundle"), ("missing", "does not exist")])
def test_failed_start_logs_the_reason_without_a_traceback(tmp_path: Path, models: str, why: str) -> None:
    (tmp_path / "empty").mkdir()
    log = tmp_path / "log"
    process = _serve(tmp_path / models, tmp_path / "port", log)
    assert process.wait(120) == 1
    assert why in log.read_text()
    assert "Traceback" not in log.read_text()

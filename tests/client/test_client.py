"""Responses reach the caller, and cancellations and deadlines reach the server."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blocking import Blocking
from fake_image_service import PATIENCE, FakeServer, FakeService, events, response
from img2img.v1 import image_to_image_pb2 as messages
from img2img.v1 import model_pb2
from img2img_client import (
    Cancelled,
    Client,
    Completed,
    DeadlineExceeded,
    EngineStatus,
    Img2ImgError,
    ModelNotFound,
    ModelReference,
    Progress,
    Queued,
    ServerFailed,
    Started,
    Timings,
    TransformedImage,
    Unavailable,
)


@pytest.fixture(params=[Client, Blocking])
def client(request: pytest.FixtureRequest, server: FakeServer) -> Iterator[Any]:
    with request.param(server.target, timeout=120, retries=None) as made:
        yield made


def test_a_result_carries_everything(client: Client) -> None:
    result = client.transform(b"file")
    assert (result.model_id, result.model_revision, result.engine) == ("demo", "main", "onnx:cpu")
    assert result.timings == Timings(1, 2, 3, 4, 11)
    (image,) = result.images
    assert (image.format, image.width, image.height, image.seed) == ("png", 4, 2, 7)
    assert result.image.size == image.image.size == (4, 2)
    assert result.image.getpixel((0, 0)) == (255, 0, 0)


def test_an_image_is_saved_as_it_was_sent(tmp_path: Path) -> None:
    image = TransformedImage(b"bytes", "jpeg", 4, 2, 7)
    image.save(tmp_path / "a.JPG")
    image.save(str(tmp_path / "no-suffix"))
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"bytes"}
    with pytest.raises(ValueError, match="format='png'"):
        image.save(tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_events_come_in_order_and_typed(client: Client, service: FakeService) -> None:
    steps = [messages.Progress(step=1, step_count=9, preview=b"p"), messages.Progress(step=2, step_count=9, eta_seconds=0.5)]
    service.script.insert(0, messages.TransformStreamResponse())  # What a newer server may send is passed over.
    service.script.insert(1, messages.TransformStreamResponse(queued=messages.Queued(position=0)))
    service.script.insert(4, messages.TransformStreamResponse(progress=steps[0]))
    service.script.insert(5, messages.TransformStreamResponse(progress=steps[1]))
    *before, completed = client.transform_stream(b"file")
    assert before == [
        Queued(0, None),
        Queued(3, 1.5),
        Started(7, "onnx:cpu"),
        Progress(1, 9, b"p"),
        Progress(2, 9, None, 0.5),
        Progress(1, 2),
        Progress(2, 2),
    ]
    assert completed == Completed(client.transform(b"file"))


def test_a_preview_is_an_image(client: Client, service: FakeService) -> None:
    service.script = events(steps=2, preview_interval=1)
    first, second = (event for event in client.transform_stream(b"file", preview_interval=1) if isinstance(event, Progress))
    assert first.preview_image is not None
    assert (first.preview_image.format, first.preview_image.size) == ("JPEG", (4, 2))
    assert second.preview_image is None


def test_a_stream_without_a_result_is_an_error(client: Client, service: FakeService) -> None:
    service.script = events()[:-1]
    with pytest.raises(ServerFailed, match="without a result"):
        list(client.transform_stream(b"file"))


def test_response_without_an_image_is_an_error(client: Client, service: FakeService) -> None:
    service.script[-1] = messages.TransformStreamResponse(completed=messages.TransformResponse())
    with pytest.raises(ServerFailed, match="contains no image"):
        list(client.transform_stream(b"file"))


@pytest.mark.parametrize("leave", ["context", "close", "drop"])
def test_leaving_a_stream_early_cancels_on_the_server(client: Client, service: FakeService, leave: str) -> None:
    service.hold = True
    stream = client.transform_stream(b"file")
    assert isinstance(next(stream), Queued)
    assert service.holding.wait(PATIENCE)
    assert not service.released.is_set()
    if leave == "context":
        with stream:
            pass
    elif leave == "close":
        stream.close()
    else:
        del stream
    assert service.released.wait(PATIENCE)


def test_closed_stream_raises_cancelled(client: Client, service: FakeService) -> None:
    service.hold = True
    with client.transform_stream(b"file") as stream:
        next(stream)
    with pytest.raises(Cancelled):
        list(stream)


def test_closing_a_finished_stream_is_harmless(client: Client) -> None:
    with client.transform_stream(b"file") as stream:
        *_, last = stream
    assert isinstance(last, Completed)
    assert list(stream) == []


@pytest.mark.parametrize("kind", [Client, Blocking])
def test_closing_the_client_cancels_running_calls(kind: Any, server: FakeServer) -> None:
    server.service.hold = True
    failures: list[Img2ImgError] = []
    client = kind(server.target)

    def transform() -> None:
        with pytest.raises(Img2ImgError) as caught:
            client.transform(b"file")
        failures.append(caught.value)

    thread = threading.Thread(target=transform)
    thread.start()
    assert server.service.holding.wait(PATIENCE)
    client.close()
    assert server.service.released.wait(PATIENCE)
    thread.join(PATIENCE)
    assert [type(failure) for failure in failures] == [Cancelled]
    client.__exit__(None, None, None)


@pytest.mark.parametrize("kind", [Client, Blocking])
def test_timeouts_become_deadlines(kind: Any, server: FakeServer) -> None:
    with kind(server.target) as endless, kind(server.target, timeout=50) as patient:
        endless.transform(b"file")
        patient.transform(b"file")
        patient.transform(b"file", timeout=500)
        list(patient.transform_stream(b"file", timeout=500))
    none, default, *own = server.service.seconds_left
    assert none is None or none > 1e6
    assert default is not None
    assert 10 < default < 51
    assert all(seconds is not None and 100 < seconds < 501 for seconds in own)
    assert len(own) == 2


def test_a_deadline_ends_both_sides(client: Client, service: FakeService) -> None:
    service.hold = True
    with pytest.raises(DeadlineExceeded, match="timeout expired"):
        client.transform(b"file", timeout=0.2)
    assert service.released.wait(PATIENCE)


@pytest.mark.parametrize("kind", [Client, Blocking])
def test_unreachable_server_raises_unavailable(kind: Any) -> None:
    with kind("127.0.0.1:1", timeout=10) as client, pytest.raises(Unavailable) as caught:
        client.models()
    assert (caught.value.status, caught.value.reason) == ("UNAVAILABLE", "")


def test_models_have_all_fields(client: Client, service: FakeService) -> None:
    service.models = [
        model_pb2.Model(
            id="demo",
            source={"path": "demo/model", "allow_patterns": ["*.json"]},  # type: ignore[arg-type]
            family="stable-diffusion",
            pipeline_class="StableDiffusionPipeline",
            backend="torch",
            backend_reason="no exporter",
            engine="torch:cpu",
            state=model_pb2.MODEL_STATE_READY,
            size_multiple=8,
            is_default=True,
            schedulers=["DDIMScheduler", "DPM++ 2M"],
            engines=[
                model_pb2.EngineStatus(name="onnx:tensorrt", state=model_pb2.ENGINE_STATE_BUILDING, detail="unet", progress=0.25),
                model_pb2.EngineStatus(name="onnx:new", state=99),  # type: ignore[arg-type]
            ],
        ),
        model_pb2.Model(id="other", state=99),  # type: ignore[arg-type]
    ]
    demo, other = client.models()
    assert demo == client.model("demo")
    assert demo.source == ModelReference(path="demo/model", allow_patterns=("*.json",))
    assert (demo.family, demo.pipeline_class) == ("stable-diffusion", "StableDiffusionPipeline")
    assert (demo.backend, demo.backend_reason, demo.engine) == ("torch", "no exporter", "torch:cpu")
    assert (demo.state, demo.size_multiple, demo.is_default) == ("ready", 8, True)
    assert (demo.schedulers, other.schedulers) == (("DDIMScheduler", "DPM++ 2M"), ())
    assert (other.state, other.source, other.is_default) == ("unspecified", ModelReference(), False)
    assert demo.engines == (
        EngineStatus("onnx:tensorrt", "building", "unet", 0.25),
        EngineStatus("onnx:new", "unspecified", "", 0.0),
    )
    with pytest.raises(ModelNotFound, match="no model nothing"):
        client.model("nothing")


def test_wait_until_ready_returns_at_once_for_a_ready_server(client: Client) -> None:
    client.wait_until_ready(PATIENCE)


@pytest.mark.parametrize("kind", [Client, Blocking])
def test_a_health_watch_reports_each_change_and_a_broken_connection(kind: Any) -> None:
    server = FakeServer()
    server.start()
    with kind(server.target) as client:
        changes = client.watch_health(timeout=PATIENCE)
        assert next(changes) is True
        for serving in (False, True, False):
            server.set_serving(serving)
            assert next(changes) is serving
        server.stop()
        with pytest.raises(Unavailable):
            next(changes)
        assert next(changes, None) is None


@pytest.mark.parametrize("kind", [Client, Blocking])
def test_wait_until_ready_waits_for_the_server_to_start(kind: Any) -> None:
    server = FakeServer()
    ready = threading.Event()

    def wait() -> None:
        with kind(server.target) as client:
            client.wait_until_ready(PATIENCE)
            ready.set()

    thread = threading.Thread(target=wait)
    thread.start()
    server.start()
    try:
        assert ready.wait(PATIENCE)
        thread.join(PATIENCE)
    finally:
        server.stop()


def test_wait_until_ready_waits_for_health_to_become_serving(server: FakeServer, client: Client) -> None:
    server.set_serving(False)
    with pytest.raises(DeadlineExceeded, match="was not ready in time"):
        client.wait_until_ready(0.2)
    thread = threading.Thread(target=client.wait_until_ready, args=(PATIENCE,))
    thread.start()
    server.set_serving(True)
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_proxy_variables_are_ignored_for_loopback_targets(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for target in (server.target, server.target.replace("127.0.0.1", "localhost")):
        with Client(target, timeout=120) as client:
            assert client.models() == ()


def test_https_scheme_enables_tls(server: FakeServer) -> None:
    with Client(f"https://{server.target}", timeout=120) as client, pytest.raises(Unavailable):
        client.models()
    assert server.service.requests == []


def test_the_client_imports_no_computing_library() -> None:
    libraries = ("torch", "numpy", "onnxruntime", "diffusers", "transformers", "PIL", "rich", "opentelemetry")
    heavy = (*libraries, "img2img_server", "img2img_export")
    code = (
        f"import sys; from img2img_client import AsyncClient, Client; sys.exit([m for m in {heavy} if m in sys.modules] or None)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, stderr=subprocess.PIPE, timeout=60).stderr == b""


def test_package_exports_its_public_names() -> None:
    import img2img_client

    assert all(hasattr(img2img_client, name) for name in img2img_client.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = img2img_client.nothing
    assert response().images

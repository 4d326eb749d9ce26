"""The client with a real server, whose model is a fake."""

import io
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from collecting import collecting
from fake_image_service import PATIENCE, image_bytes
from fakes import FakePipeline
from img2img_client import (
    Asset,
    AssetNotFound,
    Client,
    Completed,
    InvalidRequest,
    ModelNotFound,
    PermissionDenied,
    Queued,
    RetryPolicy,
    Started,
    TransformResult,
    Unauthenticated,
)
from img2img_server.access import tokens
from img2img_server.access.tokens import Token
from img2img_server.config import AssetSettings, TelemetrySettings, TlsSettings
from img2img_server.engine.scheduler import QueueLimits
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from PIL import Image
from running import RunningServer, running, store


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def real(pipeline: FakePipeline, tmp_path: Path) -> Iterator[RunningServer]:
    limits = QueueLimits(max_active=1, max_waiting=1, max_batch_size=1)
    with running(lambda: store(m=pipeline), assets=AssetSettings(url=str(tmp_path / "assets")), limits=limits) as server:
        yield server


@pytest.fixture
def client(real: RunningServer) -> Iterator[Client]:
    with Client(f"127.0.0.1:{real.port}", timeout=60) as client:
        yield client


def test_source_is_uploaded_once_and_results_are_returned(client: Client) -> None:
    source = image_bytes("green", (32, 16))
    asset = client.upload(source)
    assert (asset.media_type, asset.size) == ("image/png", len(source))
    assert client.upload(source).id == asset.id
    assert client.download(asset) == source
    for image in (asset, asset.uri):
        kept = client.transform(image, as_asset=True, format="webp").images[0]
        assert kept.asset_id is not None
        with Image.open(io.BytesIO(client.download(kept.asset_id))) as result:
            assert (result.format, result.size) == ("WEBP", (32, 16))
    client.delete_asset(asset)
    for call in (client.download, client.delete_asset, client.transform):
        with pytest.raises(AssetNotFound):
            call(asset)
    with pytest.raises(AssetNotFound):
        client.transform(f"asset:{'0' * 64}")
    with pytest.raises(InvalidRequest):
        client.upload(b"no image")
    with pytest.raises(InvalidRequest):
        client.download("no id")


def test_results_and_errors_have_the_callers_request_id(client: Client) -> None:
    assert client.transform(image_bytes(size=(16, 16)), request_id="mine").request_id == "mine"
    with client.transform_stream(image_bytes(size=(16, 16)), request_id="mine-too") as events:
        *_, completed = events
    assert isinstance(completed, Completed)
    assert completed.result.request_id == events.request_id == "mine-too"
    with pytest.raises(ModelNotFound) as caught:
        client.transform(image_bytes(), model="nothing", request_id="wrong")
    assert caught.value.request_id == "wrong"
    with pytest.raises(ModelNotFound) as caught:
        client.model("nothing")
    assert caught.value.request_id


@pytest.mark.parametrize("streamed", [False, True])
def test_queue_full_is_retried_until_admitted(
    real: RunningServer, pipeline: FakePipeline, client: Client, streamed: bool
) -> None:
    gate, refused = threading.Event(), threading.Event()
    pipeline.before_call = lambda: gate.wait(PATIENCE)
    source = image_bytes(size=(16, 16))
    first = client.transform_stream(source)
    assert [type(next(first)) for _ in range(2)] == [Queued, Started]
    second = client.transform_stream(source)
    assert isinstance(next(second), Queued)
    results: list[TransformResult] = []

    def work() -> None:
        policy = RetryPolicy(max_attempts=100, on_retry=lambda *_: refused.set())
        with Client(f"127.0.0.1:{real.port}", timeout=60, retries=policy) as third:
            if streamed:
                *_, completed = third.transform_stream(source)
                assert isinstance(completed, Completed)
                results.append(completed.result)
            else:
                results.append(third.transform(source))

    thread = threading.Thread(target=work)
    thread.start()
    assert refused.wait(PATIENCE)
    assert results == []
    gate.set()
    for events in (first, second):
        assert isinstance(list(events)[-1], Completed)
    thread.join(PATIENCE)
    assert len(results) == 1
    assert len(pipeline.prepared) == 3


def test_client_works_with_server_tokens_and_certificates(tmp_path: Path) -> None:
    authority, path = trustme.CA(), tmp_path / "tokens.toml"
    own = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    own.cert_chain_pems[0].write_to_path(str(tmp_path / "server.pem"))
    own.private_key_pem.write_to_path(str(tmp_path / "server.key"))
    (tmp_path / "server.key").chmod(0o600)
    secret, another = tokens.make_secret(), tokens.make_secret()
    with tokens.editing(path) as known:
        known["alice"] = Token("alice", tokens.digest(secret))
        known["bob"] = Token("bob", tokens.digest(another))
    tls = TlsSettings(tmp_path / "server.pem", tmp_path / "server.key")
    assets = AssetSettings(url=str(tmp_path / "assets"))
    with running(lambda: store(m=FakePipeline()), tls=tls, tokens=path, assets=assets) as server:
        target, ca = f"https://127.0.0.1:{server.port}", tmp_path / "ca.pem"
        with Client(target, ca=ca, timeout=60) as nobody, pytest.raises(Unauthenticated) as caught:
            nobody.models()
        assert caught.value.request_id
        with Client(target, ca=ca, token=secret, timeout=60) as alice, Client(target, ca=ca, token=another, timeout=60) as bob:
            alice.wait_until_ready()
            assert alice.transform(image_bytes(size=(16, 16))).images
            asset: Asset = alice.upload(image_bytes())
            assert alice.download(asset) == image_bytes()
            with pytest.raises(AssetNotFound):
                bob.download(asset)
            with pytest.raises(PermissionDenied):
                alice.unload_model("m")


@pytest.mark.parametrize("streamed", [False, True])
def test_one_trace_spans_the_caller_and_the_denoising_steps(monkeypatch: pytest.MonkeyPatch, streamed: bool) -> None:
    provider = TracerProvider()
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    source = image_bytes(size=(16, 16))
    with collecting() as collector:
        telemetry = TelemetrySettings(otlp_endpoint=collector.endpoint)
        with (
            running(lambda: store(m=FakePipeline()), telemetry=telemetry, assets=AssetSettings(url="none")) as server,
            Client(f"127.0.0.1:{server.port}", timeout=60) as client,
            provider.get_tracer("test").start_as_current_span("a program's own") as own,
        ):
            list(client.transform_stream(source)) if streamed else client.transform(source)
        procedure = "TransformStream" if streamed else "Transform"
        call = collector.named(f"img2img.v1.ImageToImageService/{procedure}")
        steps = [span for span in collector.spans if span.name == "step"]
    assert len(steps) == 20
    trace_id = f"{own.get_span_context().trace_id:032x}"
    assert {span.trace for span in (call, *steps)} == {trace_id}
    assert call.parent not in ("", f"{own.get_span_context().span_id:016x}"), "the client's span lies between"

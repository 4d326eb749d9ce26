"""A server that is killed under load, whose disk is full, whose model fails or hangs: nothing is lost, torn or half done.

Real server processes, most of them of the stand-in in `benchmarks/soak_parts`, which is `img2img serve` in all but the model.
"""

import functools
import hashlib
import io
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from chaos import big_source, is_right, source, torn_assets
from covering import nightly_but
from grpc_health.v1 import health_pb2, health_pb2_grpc
from img2img.v1 import asset_pb2
from img2img.v1.asset_pb2_grpc import AssetServiceStub
from img2img_client import Asset, AssetNotFound, Client, Completed, Img2ImgError, Progress, RetryPolicy, Unavailable
from PIL import Image
from soak_parts.process import STAND_IN, ServingProcess, serving
from soak_parts.stand_in import STEP_SECONDS, plant

SECONDS = 600.0
"""After which something counts as hung. Restarts of a server, on a busy machine, are well within it."""
ATTEMPTS = 100_000
PATIENT = RetryPolicy(max_attempts=ATTEMPTS, first_backoff=0.05, most_backoff=0.5)
CALLERS, REQUESTS, STEPS = 12, 4, 10
EX_SOFTWARE = 70


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A folder with a bundle."""
    plant(tmp_path / "models", "m")
    return tmp_path / "models"


def words(store: Path, assets: str | Path = "none", *flags: str) -> list[str]:
    return [*STAND_IN, "--models", str(store), "--warm-up", "0", "--assets", str(assets), *flags]


def interrupted_stream(server: ServingProcess) -> None:
    """A stream that is under way when the server is killed: it ends with an error, once, as its client does not try again."""
    with Client(server.target, timeout=SECONDS, retries=None) as client:
        client.wait_until_ready()  # gRPC remembers that there was no server here a moment ago
        with client.transform_stream(source(0), seed=0, num_inference_steps=STEPS, strength=1.0) as events:
            assert any(isinstance(event, Progress) for event in events)
            server.kill()
            with pytest.raises(Unavailable):
                assert not any(isinstance(event, Completed) for event in events)


def test_each_request_ends_once_with_its_image_if_the_server_is_killed_under_load(store: Path, tmp_path: Path) -> None:
    """`kill -9`, twice, and a start on the same port, while twelve callers send one request after another."""
    retried: list[str] = []
    policy = RetryPolicy(
        max_attempts=ATTEMPTS, first_backoff=0.05, most_backoff=0.5, on_retry=lambda n, error, wait: retried.append(error.status)
    )

    def caller(number: int) -> list[tuple[int, int, bool]]:
        ended, file, prompt = [], source(number), f"caller {number}"
        with Client(server.target, timeout=SECONDS, retries=policy) as client:
            for seed in range(REQUESTS):
                result = client.transform(file, prompt=prompt, seed=seed, num_inference_steps=STEPS, strength=1.0)
                (image,) = result.images
                ended.append((number, seed, is_right(image.data, file, prompt, seed, STEPS)))
        return ended

    with (
        serving(tmp_path, words(store), {STEP_SECONDS: "0.02"}) as server,
        ThreadPoolExecutor(CALLERS) as callers,
    ):
        running = [callers.submit(caller, number) for number in range(CALLERS)]
        for _ in range(2):
            interrupted_stream(server)
            server.start(server.port)
        ended = [each for call in running for each in call.result(SECONDS)]
    assert sorted(ended) == [(number, seed, True) for number in range(CALLERS) for seed in range(REQUESTS)]
    assert "UNAVAILABLE" in retried, "the kills met requests in progress"


@pytest.mark.nightly
def test_kill_during_uploads_tears_no_asset(store: Path, tmp_path: Path) -> None:
    """Acknowledged assets are complete; others are complete or absent."""
    assets = tmp_path / "assets"
    acknowledged: dict[str, bytes] = {}
    stop = threading.Event()

    def uploader(number: int) -> None:
        with Client(server.target, timeout=SECONDS, retries=PATIENT) as client:
            while not stop.is_set():
                data = big_source(300_000 + number)
                acknowledged[client.upload(data).id] = data

    with serving(tmp_path, words(store, assets), {STEP_SECONDS: "0.001"}) as server, ThreadPoolExecutor(4) as uploaders:
        running = [uploaders.submit(uploader, number) for number in range(4)]
        try:
            for round_number in range(1, 4):
                wait_for(lambda least=8 * round_number: len(acknowledged) >= least, running)  # type: ignore[misc]
                server.kill()
                assert torn_assets(assets) == []
                server.start(server.port)
        finally:
            stop.set()
        for upload in running:
            upload.result(SECONDS)
        with Client(server.target, timeout=SECONDS) as client:
            for asset_id, data in acknowledged.items():
                assert client.download(asset_id) == data
    assert torn_assets(assets) == []


def wait_for(holds: Callable[[], bool], running: list[Any]) -> None:
    """Waits for a condition that `running` tasks cause; raises the error of any of them."""
    tick = threading.Event()
    while not holds():
        for each in running:
            if each.done():
                each.result()
        tick.wait(0.01)


def test_upload_interrupted_by_a_kill_leaves_nothing(store: Path, tmp_path: Path) -> None:
    data, sent = big_source(200_000), threading.Event()
    digest = hashlib.sha256(data).hexdigest()

    def messages() -> Iterator[asset_pb2.UploadAssetRequest]:
        yield asset_pb2.UploadAssetRequest(info=asset_pb2.UploadAssetInfo(size=len(data), sha256=digest))
        yield asset_pb2.UploadAssetRequest(chunk=data[:150_000])
        sent.wait(SECONDS)

    with serving(tmp_path, words(store, tmp_path / "assets")) as server:
        with grpc.insecure_channel(server.target) as channel:
            call = AssetServiceStub(channel).UploadAsset.future(messages(), timeout=SECONDS)
            with Client(server.target, timeout=SECONDS) as client:
                client.upload(source(1))  # by then the other upload has begun
            server.kill()
            sent.set()
            error: Any = call.exception(SECONDS)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
        server.start()
        with Client(server.target, timeout=SECONDS) as client:
            with pytest.raises(AssetNotFound):
                client.download(digest)
            assert client.upload(data).id == digest
            assert client.download(digest) == data


def tmpfs(folder: Path) -> tuple[list[str], None]:
    """A command's beginning that gives it a filesystem of 256 KiB of its own at `folder`."""
    mount = ["unshare", "-Urm", "sh", "-c", f'mount -t tmpfs -o size=256k none "{folder}" && exec "$@"', "sh"]
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine gives an ordinary user no filesystem of its own")
    return mount, None


def quota(folder: Path) -> tuple[list[str], Callable[[], None]]:
    """No file of the process may have more than 256 KiB."""
    return [], functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2**18, 2**18))


@pytest.mark.parametrize("full", [tmpfs, pytest.param(quota, marks=pytest.mark.nightly)])
def test_full_disk_fails_only_the_upload(
    full: Callable[[Path], tuple[list[str], Callable[[], None] | None]], store: Path, tmp_path: Path
) -> None:
    assets = tmp_path / "assets"
    assets.mkdir()
    prefix, prepare = full(assets)
    with (
        serving(tmp_path, [*prefix, *words(store, assets)], prepare=prepare) as server,
        Client(server.target, timeout=SECONDS, retries=None) as client,
    ):
        kept = big_source(60_000)
        first = client.upload(kept)
        for _ in range(3):
            with pytest.raises(Img2ImgError) as caught:
                client.upload(big_source(300_000))
            assert (caught.value.status, caught.value.reason) == ("UNAVAILABLE", "STORAGE_FAILED")
            assert str(tmp_path) not in str(caught.value)
        # The stored files are complete, files within the quota can be stored, and images are made.
        assert client.download(first.id) == kept
        assert isinstance(client.upload(big_source(50_000)), Asset)
        result = client.transform(source(2), prompt="p", seed=3, num_inference_steps=4)
        assert is_right(result.images[0].data, source(2), "p", 3, 4)
        server.terminate()
        assert server.wait(SECONDS) == 0
    assert "Traceback" not in server.read_log()


def test_out_of_memory_while_decoding_is_not_reported_as_damage(store: Path, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (320, 320), "red").save(file, "PNG")  # a small file of 300 KiB of pixels
    _, prepare = quota(tmp_path)
    with (
        serving(tmp_path, words(store), prepare=prepare) as server,
        Client(server.target, timeout=SECONDS, retries=None) as client,
    ):
        for _ in range(2):
            with pytest.raises(Img2ImgError) as caught:
                client.transform(file.getvalue(), prompt="p")
            assert (caught.value.status, caught.value.reason) == ("UNAVAILABLE", "STORAGE_FAILED")
        result = client.transform(source(2), prompt="p", seed=3, num_inference_steps=4)
        assert is_right(result.images[0].data, source(2), "p", 3, 4)
    assert "Traceback" not in server.read_log()


def test_failing_model_call_fails_only_its_own_request(store: Path, tmp_path: Path) -> None:
    with (
        serving(tmp_path, words(store)) as server,
        Client(server.target, timeout=SECONDS) as client,
        ThreadPoolExecutor(8) as callers,
    ):

        def ask(number: int, prompt: str) -> bytes:
            return client.transform(source(number), prompt=prompt, seed=number, num_inference_steps=8).images[0].data

        stages = ("prepare", "denoise", "advance", "finish")
        good = {number: callers.submit(ask, number, "p") for number in range(4)}
        bad = [callers.submit(ask, number, f"raise {stage}") for number, stage in enumerate(stages)]
        for call in bad:
            error = call.exception(SECONDS)
            assert isinstance(error, Img2ImgError)
            assert (error.status, error.reason) == ("INTERNAL", "MODEL_FAILED")
            assert "planted" not in str(error), "what the model said stays in the log"
        for number, call in good.items():
            assert is_right(call.result(SECONDS), source(number), "p", number, 8)
        assert server.read_log().count("/planted/path") >= len(stages)


@pytest.mark.parametrize("stage", nightly_but(["prepare", "denoise", "finish"], "denoise"))
def test_hanging_model_call_ends_the_server_and_answers_every_request(stage: str, store: Path, tmp_path: Path) -> None:
    """Health is not serving, every caller gets an error, and the process exits with its own status."""
    with (
        serving(tmp_path, words(store, "none", "--watchdog", "1")) as server,
        Client(server.target, timeout=SECONDS, retries=None) as client,
        grpc.insecure_channel(server.target) as channel,
        ThreadPoolExecutor(5) as callers,
    ):
        health: Any = health_pb2_grpc.HealthStub(channel)
        states = health.Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        assert next(states).status == health_pb2.HealthCheckResponse.SERVING
        calls = [callers.submit(client.transform, source(1), prompt=f"hang {stage}")]
        calls += [callers.submit(client.transform, source(n), prompt="p", num_inference_steps=50) for n in range(4)]
        assert next(states).status == health_pb2.HealthCheckResponse.NOT_SERVING
        for call in calls:
            error = call.exception(SECONDS)
            if error is not None:  # a request whose image was finished before may have it
                assert isinstance(error, Unavailable), error
                assert error.reason in ("ENGINE_STUCK", "SHUTTING_DOWN")
        assert calls[0].exception() is not None
        assert server.wait(SECONDS) == EX_SOFTWARE
    assert stage in server.read_log()

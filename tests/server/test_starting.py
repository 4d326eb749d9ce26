"""Startup of a server: it listens first, reports errors before it loads models, and serves the models that work."""

import asyncio
import functools
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from fakes import Caller, Clock, FakePipeline, make_engine, run_out
from grpc_health.v1 import health_pb2, health_pb2_grpc
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1 import model_pb2
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img.v1.model_pb2_grpc import ModelServiceStub
from img2img_client import Client
from img2img_server.backends.local import LocalBackend
from img2img_server.bundle.manifest import Manifest
from img2img_server.config import ModelSettings
from img2img_server.engine.engine import Engine
from img2img_server.errors import BundleError, ModelFailed
from img2img_server.models.loader import Preparation
from img2img_server.models.registry import ModelRegistry, ModelState
from img2img_server.telemetry import logs
from messages import failure, request
from model_folder import make_bundle
from PIL import Image
from running import RunningServer, running, starting, store

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
HEAVY = ("torch", "onnxruntime", "diffusers", "transformers", "ray")


class Panic(BaseException):
    """Like a panic of a library in Rust, which is no Exception."""


@contextmanager
def loading(gate: threading.Event, **settings: object) -> Iterator[tuple[RunningServer, grpc.Channel, Future[None]]]:
    """A server that listens, and whose model is loaded once `gate` is set."""
    begun = threading.Event()

    def load_models() -> ModelRegistry:
        begun.set()
        assert gate.wait(60)
        return store(m=FakePipeline())

    with starting(functools.partial(LocalBackend, load_models=load_models), **settings) as (server, started):
        assert begun.wait(60)
        with grpc.insecure_channel(f"localhost:{server.port}") as channel:
            yield server, channel, started
        gate.set()
        started.result(60)


def health(channel: grpc.Channel, name: str = "") -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)  # its stubs for mypy know no methods
    return int(stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=60).status)


def test_while_loading_health_is_not_serving_and_calls_are_refused() -> None:
    gate = threading.Event()
    with loading(gate) as (_, channel, _):
        models, images = ModelServiceStub(channel), ImageToImageServiceStub(channel)
        assert [health(channel, name) for name in ("", "img2img.v1.ImageToImageService")] == [NOT_SERVING] * 2
        calls: list[Callable[[], object]] = [
            lambda: models.ListModels(model_pb2.ListModelsRequest()),
            lambda: models.LoadModel(model_pb2.LoadModelRequest(id="m")),
            lambda: images.Transform(request()),
            lambda: list(images.TransformStream(pb.TransformStreamRequest(request=request()))),
        ]
        for call in calls:
            code, details = failure(call)
            assert (code, details["reason"]) == (grpc.StatusCode.UNAVAILABLE, "SERVER_STARTING")
            assert details["retry"] == 1.0
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == NOT_SERVING
        gate.set()
        assert next(watch).status == SERVING
        assert [model.id for model in models.ListModels(model_pb2.ListModelsRequest()).models] == ["m"]


def test_a_client_waits_until_the_server_serves() -> None:
    gate = threading.Event()
    with loading(gate) as (server, _, _), Client(f"localhost:{server.port}", timeout=60) as client:
        threading.Timer(0, gate.set).start()
        client.wait_until_ready(60)
        assert [model.id for model in client.models()] == ["m"]


def test_stop_during_startup_closes_the_port() -> None:
    gate = threading.Event()
    with loading(gate) as (server, _, _):
        server.stop().result(60)
        with socket.socket() as again:
            again.bind(("127.0.0.1", server.port))
        gate.set()


@pytest.fixture
def taken() -> Iterator[int]:
    """A port in use."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def serve(*words: object) -> tuple[int, str, str]:
    """The status of `img2img serve`, its standard error, and which heavy packages it imported."""
    code = "import sys; from img2img_cli.__main__ import main; status = main(sys.argv[1:])\n"
    code += f"print(*sorted({set(HEAVY)!r} & set(sys.modules))); sys.exit(status)"
    command = [sys.executable, "-c", code, "serve", *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return result.returncode, result.stderr, result.stdout.strip()


def test_errors_are_one_line_and_precede_heavy_imports(tmp_path: Path, taken: int) -> None:
    bundle = make_bundle(tmp_path / "models" / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "model_index.json").write_text("{}")
    file = tmp_path / "file"
    file.write_text("")
    good = ("--models", bundle, "--port", 0)
    for words, why in (
        (("--models", tmp_path / "none"), f"models: {tmp_path / 'none'} does not exist: give a folder of bundles"),
        (("--models", file), f"models: {file} is a file, not a folder"),
        (("--models", tmp_path / "empty"), "has no bundle: make one with `img2img export MODEL --output"),
        (("--models", tmp_path / "raw"), "is a model that was not exported: run `img2img export"),
        (("--models", bundle, "--default-model", "b"), "the default model 'b' is not in the store, which has a"),
        (("--models", bundle, "--preload", "b"), "model 'b' does not exist; available: a"),
        (("--models", bundle, "--port", taken), f"port: 127.0.0.1:{taken} is in use by another process"),
        ((*good, "--metrics-port", taken), f"metrics_port: 127.0.0.1:{taken} is in use by another process"),
        ((*good, "--metrics-port", "0", "--metrics-host", "192.0.2.1"), "metrics_port: cannot listen on 192.0.2.1:0: "),
        ((*good, "--host", "192.0.2.1", "--allow-insecure"), "port: cannot listen on 192.0.2.1:0: "),
        (
            (*good, "--tls-certificate", tmp_path / "c", "--tls-key", tmp_path / "k"),
            f"{tmp_path / 'c'} cannot be read: No such file",
        ),
        ((*good, "--tokens", tmp_path / "t"), f"{tmp_path / 't'}"),
        (
            (*good, "--port-file", tmp_path / "x" / "port"),
            f"port_file: {tmp_path / 'x' / 'port'} cannot be written: No such file",
        ),
        ((*good, "--assets", file), f"assets: '{file}' cannot be used"),
        ((*good, "--trace", tmp_path / "x" / "trace"), f"trace: {tmp_path / 'x' / 'trace'} cannot be written: No such file"),
    ):
        status, said, heavy = serve(*words)
        errors = [line for line in said.splitlines() if not line[:1].isdigit()]  # the log's lines begin with the time
        assert (status, len(errors)) in ((1, 1), (2, 1)), said
        assert errors[0].startswith("img2img serve: "), said
        assert why in errors[0]
        assert heavy == ""


def load(folder: Path, wrong: dict[str, BaseException], **settings: Any) -> ModelRegistry:
    """A store of the bundles in `folder`; loading those in `wrong` fails."""

    def make(bundle: Path, manifest: Manifest) -> FakePipeline:
        if bundle.name in wrong:
            raise wrong[bundle.name]
        return FakePipeline()

    return ModelRegistry.load(folder, make, settings=ModelSettings(**settings) if settings else None)


FAILURES = [
    (BundleError("unet/model.onnx: SHA-256 differs"), "unet/model.onnx: SHA-256 differs"),
    (RuntimeError("onnx: a secret in /srv/models/x"), "(RuntimeError)"),
    (MemoryError(), "out of memory"),
    (AssertionError("dim"), "(AssertionError)"),
    (Panic("tokenizer.json"), "(Panic)"),
    (OSError(28, "No space left on device", "/srv/cache"), "(OSError)"),
    (SystemExit(3), "(SystemExit)"),
]


@pytest.mark.parametrize(("error", "detail"), FAILURES, ids=[type(error).__name__ for error, _ in FAILURES])
def test_failed_load_is_reported_and_other_models_are_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: BaseException, detail: str
) -> None:
    for name in "ab":
        make_bundle(tmp_path / name)
    with (
        running(lambda: load(tmp_path, {"a": error})) as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
        Client(f"localhost:{server.port}", timeout=60) as client,
    ):
        assert [health(channel, name) for name in ("", "models/a", "models/b")] == [SERVING, NOT_SERVING, SERVING]
        a, b = client.models()
        assert (a.state, b.state) == ("failed", "ready")
        assert detail in a.detail
        assert "the server's log says why" in a.detail
        assert str(tmp_path) not in a.detail
        assert "/srv" not in a.detail
    (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert line.getMessage().startswith("model 'a' cannot be served: it could not be loaded: ")
    assert str(error) in line.getMessage()
    assert line.exc_info is None, "no traceback is logged"


@pytest.mark.parametrize(("error", "detail"), FAILURES, ids=[type(error).__name__ for error, _ in FAILURES])
def test_a_model_that_fails_in_warm_up_is_failed_and_the_others_are_served(error: BaseException, detail: str) -> None:
    bad = FakePipeline(Clock())

    def fail() -> None:
        raise error

    bad.before["denoise"] = fail
    with (
        running(lambda: store(a=bad, m=FakePipeline()), warm_up=0.1) as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
        Client(f"localhost:{server.port}", timeout=60) as client,
    ):
        assert [health(channel, name) for name in ("", "models/a", "models/m")] == [SERVING, NOT_SERVING, SERVING]
        a, m = client.models()
        assert (a.state, m.state) == ("failed", "ready")
        assert a.detail.startswith("it failed in warm-up")
        assert bad.closed
        code, details = failure(lambda: ImageToImageServiceStub(channel).Transform(request(model=pb.ModelReference(path="a"))))
        assert (code, details["reason"]) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_UNAVAILABLE")
        assert "it failed in warm-up" in str(details["message"])


@pytest.mark.parametrize("buckets", [(), (1, 2, 4)])
def test_hanging_warm_up_fails_only_its_model(buckets: tuple[int, ...]) -> None:
    """Also on the engine's thread, while the model is recorded: another thread replaces it."""
    bad, never = FakePipeline(Clock()), threading.Event()
    bad.row_buckets = buckets
    bad.before["denoise"] = never.wait
    try:
        with (
            running(lambda: store(a=bad, m=FakePipeline()), warm_up=0.1, watchdog=0.5) as server,
            Client(f"localhost:{server.port}", timeout=60) as client,
        ):
            a, m = client.models()
            assert (a.state, m.state) == ("failed", "ready")
            assert "warm-up" in a.detail
            assert "of 1 rows did not return within 0.5 s" in a.detail
            client.transform(Image.new("RGB", (16, 16)), prompt="", model="m")
    finally:
        never.set()


def test_server_without_a_servable_model_does_not_start(tmp_path: Path) -> None:
    for name in "ab":
        make_bundle(tmp_path / name)
    with pytest.raises(BundleError, match=r"no model can be served: a: it could not be loaded: .*one; b: .*two"):
        load(tmp_path, {"a": RuntimeError("one"), "b": BundleError("two")})
    bad = FakePipeline(Clock())
    bad.before["prepare"] = lambda: 1 // 0
    models = store(a=bad)

    async def prepare() -> None:
        await Preparation(models, Engine(models.pipelines()), 16, 1.0, 0.0).run()

    asyncio.run(prepare())
    with pytest.raises(BundleError, match="no model can be served: a: it failed in warm-up: ZeroDivisionError"):
        models.check_any(ModelSettings())


def test_server_starts_if_a_preloaded_model_fails(tmp_path: Path) -> None:
    for name in "ab":
        make_bundle(tmp_path / name)
    models = load(tmp_path, {"a": RuntimeError("one")}, preload=("a",))
    assert [model.state for model in models] == [ModelState.FAILED, ModelState.UNLOADED]
    assert models.get("a").detail.startswith("it could not be loaded (RuntimeError)")


def test_the_default_model_is_loaded_at_start_and_others_on_the_first_request(tmp_path: Path) -> None:
    for name in "abc":
        make_bundle(tmp_path / name)
    make = lambda bundle, manifest: FakePipeline()  # noqa: E731
    assert list(ModelRegistry.load(tmp_path, make, settings=ModelSettings()).pipelines()) == []
    assert list(ModelRegistry.load(tmp_path, make, "b", settings=ModelSettings()).pipelines()) == ["b"]
    assert list(ModelRegistry.load(tmp_path / "c", make, settings=ModelSettings()).pipelines()) == ["c"]
    assert list(ModelRegistry.load(tmp_path, make, "b", settings=ModelSettings(preload=("default", "a"))).pipelines()) == [
        "a",
        "b",
    ]
    assert list(ModelRegistry.load(tmp_path, make, settings=ModelSettings(preload=("all",))).pipelines()) == ["a", "b", "c"]


def test_the_log_counts_the_models_as_they_are_loaded_and_warmed_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in "ab":
        make_bundle(tmp_path / name)
    with caplog.at_level("INFO"), running(lambda: load(tmp_path, {}), warm_up=0.1):
        pass
    lines = caplog.text
    for line in (
        "listening on 127.0.0.1:",
        "model 'a' (1 of 2): loading",
        "model 'b' (2 of 2): loading",
        "model 'a': loaded in ",
        "model 'a' (1 of 2): warming up",
        "serving on 127.0.0.1:",
    ):
        assert line in lines
    assert lines.index("listening on") < lines.index("(1 of 2): loading")


def test_a_traceback_is_in_the_log_only_at_the_level_debug(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        make_bundle(tmp_path / name)
    try:
        for level, seen in (("info", False), ("debug", True)):
            logs.configure("text", level)
            load(tmp_path, {"a": RuntimeError("one")})
            said = capsys.readouterr().err
            assert "model 'a' cannot be served: it could not be loaded: RuntimeError: one" in said
            assert ("Traceback" in said) == seen
    finally:
        logs.configure("text")


def test_a_panic_in_a_call_ends_its_request_and_not_the_engine() -> None:
    engine, pipeline, _ = make_engine()

    def panic() -> None:
        raise Panic("a library in Rust")

    pipeline.before["denoise"] = panic
    first = Caller(engine).submit()
    run_out(engine)
    assert isinstance(first.error, ModelFailed)
    del pipeline.before["denoise"]
    second = Caller(engine).submit()
    run_out(engine)
    assert second.error is None

"""ModelService over a real channel: models are listed, loaded, unloaded and downloaded, and health follows."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_hub import Hub, serve
from fakes import FakePipeline
from grpc_health.v1 import health_pb2, health_pb2_grpc
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1 import model_pb2
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img.v1.model_pb2_grpc import ModelServiceStub
from img2img_server.access.access import Access
from img2img_server.config import ModelSettings
from img2img_server.models.registry import ModelRegistry
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.support.call import Call
from messages import failure, request
from model_folder import MB, Memory, make_bundle
from running import RunningServer, running, store

READY, UNLOADED, LOADING, FAILED = (
    model_pb2.MODEL_STATE_READY,
    model_pb2.MODEL_STATE_UNLOADED,
    model_pb2.MODEL_STATE_LOADING,
    model_pb2.MODEL_STATE_FAILED,
)


class Seen:
    """A server as its clients see it."""

    def __init__(self, server: RunningServer, channel: grpc.Channel, memory: Memory) -> None:
        self.server, self.memory = server, memory
        self.images, self.models = ImageToImageServiceStub(channel), ModelServiceStub(channel)
        self._health: Any = health_pb2_grpc.HealthStub(channel)

    def states(self) -> dict[str, int]:
        return {model.id: model.state for model in self.models.ListModels(model_pb2.ListModelsRequest()).models}

    def get(self, name: str) -> model_pb2.Model:
        return self.models.GetModel(model_pb2.GetModelRequest(id=name)).model

    def load(self, **fields: Any) -> model_pb2.Model:
        return self.models.LoadModel(model_pb2.LoadModelRequest(**fields)).model

    def unload(self, name: str) -> model_pb2.UnloadModelResponse:
        return self.models.UnloadModel(model_pb2.UnloadModelRequest(id=name))

    def transform(self, timeout: float | None = None, **reference: Any) -> pb.TransformResponse:
        return self.images.Transform(request(model=pb.ModelReference(**reference)), timeout=timeout)

    def serves(self, name: str) -> bool:
        answer = self._health.Check(health_pb2.HealthCheckRequest(service=f"models/{name}"))
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[Seen]:
    """A server over a folder of bundles that are nothing but names. `settings` are ModelSettings'."""
    memory = Memory()
    residency = ModelSettings(**{"preload": ("all",), **settings})

    def load() -> ModelRegistry:
        return ModelRegistry.load(folder, memory.load, settings=residency, meter=memory)

    with (
        running(load, residency=residency) as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        yield Seen(server, channel, memory)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "ab":
        make_bundle(tmp_path / "store" / name)
    return tmp_path / "store"


def test_models_load_and_unload_and_health_follows(folder: Path) -> None:
    with serving(folder, preload=("a",)) as it:
        assert it.states() == {"a": READY, "b": UNLOADED}
        assert (it.serves("a"), it.serves("b")) == (True, False)
        assert it.get("a").memory_bytes >= 200 * MB
        assert it.get("b").engine == ""
        assert it.get("b").source.repo_id == "acme/b", "its manifest is known"
        loaded = it.load(id="b")
        assert (loaded.state, loaded.engine, loaded.detail) == (READY, "fake:cpu", "")
        assert it.serves("b")
        assert it.transform(path="b").model_id == "b"
        unloaded = it.unload("a")
        assert (unloaded.model.state, unloaded.model.engine) == (UNLOADED, "")
        assert not it.serves("a")
        assert it.transform(path="a").model_id == "a", "the first request loads it again"
        assert (it.states(), it.serves("a")) == ({"a": READY, "b": READY}, True)
        assert it.transform(repo_id="acme/b").model_id == "b"


def test_requests_wait_for_a_loading_model_until_their_deadline(folder: Path) -> None:
    with serving(folder, preload=("a",)) as it:
        it.memory.gates["b"] = threading.Event()
        call = it.images.Transform.future(request(model=pb.ModelReference(path="b")))
        while (told := it.get("b")).detail != "loading":
            pass
        assert told.state == LOADING
        assert not it.serves("b")
        code, _ = failure(lambda: it.transform(path="b", timeout=0.5))
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED
        gone = it.images.Transform.future(request(model=pb.ModelReference(path="b")))
        gone.cancel()
        it.memory.gates["b"].set()
        assert call.result().model_id == "b"
        assert it.memory.loads == ["a", "b"]


def test_failed_load_is_reported(folder: Path) -> None:
    with serving(folder, preload=("a",)) as it:
        it.memory.problems["b"] = MemoryError("/a/path")
        code, details = failure(lambda: it.load(id="b"))
        assert (code, details["reason"]) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_UNAVAILABLE")
        assert "/a/path" not in str(details)
        assert (it.get("b").state, it.get("b").detail) == (
            FAILED,
            "it could not be loaded: out of memory; the server's log says why",
        )
        assert not it.serves("b")
        assert it.transform(path="a").model_id == "a", "the others go on"


def test_full_model_memory_returns_a_retry_delay(folder: Path) -> None:
    with serving(folder, preload=("a",), memory=250 * MB) as it:
        held, go = threading.Event(), threading.Event()

        def hold() -> None:
            held.set()
            assert go.wait(60)

        it.memory.opened[0].before_call = hold
        call = it.images.Transform.future(request(model=pb.ModelReference(path="a")))
        assert held.wait(60)
        code, details = failure(lambda: it.transform(path="b"))
        assert (code, details["reason"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MODEL_MEMORY_FULL")
        assert details["retry"] == pytest.approx(1.0, abs=10)
        go.set()
        assert call.result().model_id == "a"
        assert it.transform(path="b").model_id == "b"
        assert it.states() == {"a": UNLOADED, "b": READY}


@pytest.mark.parametrize(
    ("fields", "field"),
    [({}, "id"), ({"id": "a", "source": pb.ModelReference(path="a")}, "id"), ({"source": pb.ModelReference()}, "source")],
)
def test_exactly_one_of_id_and_source_is_loaded(folder: Path, fields: dict[str, Any], field: str) -> None:
    with serving(folder) as it:
        code, details = failure(lambda: it.load(**fields))
        assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, field)


def test_unknown_or_outside_models_are_not_found(folder: Path, tmp_path: Path) -> None:
    make_bundle(tmp_path / "outside")
    with serving(folder) as it:
        for name in ("c", "../outside", str(tmp_path / "outside"), "a/../a", "a\0", "x" * 20_000):
            asked: list[Callable[[], object]] = [lambda: it.load(id=name), lambda: it.transform(path=name)]  # noqa: B023
            for ask in (*asked, lambda: it.unload(name), lambda: it.get(name)):  # noqa: B023
                code, details = failure(ask)
                assert (code, details["reason"]) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"), name[:20]
        code, _ = failure(lambda: it.unload(""))
        assert code == grpc.StatusCode.NOT_FOUND
        assert it.states() == {"a": READY, "b": READY}


def test_callers_see_and_use_only_their_allowed_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each call had a token that allows model b, but not loading."""

    @contextmanager
    def admitted(self: Access, call: Call, metadata: object) -> Iterator[Call]:
        yield Call(call.method, call.request_id, client="bob", models=("b",), admin=False)

    monkeypatch.setattr(Access, "admitted", admitted)
    with serving(folder, preload=("none",)) as it:
        assert it.states() == {"b": UNLOADED}
        code, details = failure(lambda: it.get("a"))
        assert code == grpc.StatusCode.NOT_FOUND
        assert details["message"] == "model 'a' does not exist; available: b"
        code, details = failure(lambda: it.transform(path="a"))
        assert (code, details["reason"]) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
        for change in (lambda: it.load(id="b"), lambda: it.unload("b")):
            code, details = failure(change)
            assert (code, details["message"]) == (
                grpc.StatusCode.PERMISSION_DENIED,
                "'bob' is not allowed to load or unload models: use an admin token",
            )
        assert it.memory.loads == []
        assert it.transform(path="b").model_id == "b"


def test_health_is_not_serving_during_drain(folder: Path) -> None:
    with serving(folder, preload=("none",)) as it:
        it.load(id="b")
        held, go = threading.Event(), threading.Event()

        def hold() -> None:
            held.set()
            assert go.wait(60)

        it.memory.opened[0].before_call = hold
        call = it.images.Transform.future(request(model=pb.ModelReference(path="b")))
        assert held.wait(60)
        stopping = it.server.stop()
        while it.serves("b"):
            pass
        go.set()
        assert call.result().model_id == "b"
        stopping.result(60)


def test_unloaded_model_without_a_bundle_cannot_be_reloaded() -> None:
    with (
        running(lambda: store(m=FakePipeline())) as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        it = Seen(server, channel, Memory())
        assert it.unload("m").model.state == UNLOADED
        code, _ = failure(lambda: it.transform(path="m"))
        assert code == grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture
def hub(tiny_model: Callable[[str], Path]) -> Iterator[Hub]:
    """A stand-in for the hub that has a tiny model as "acme/tiny": one of few graphs."""
    folder = tiny_model("sd3-no-t5")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with serve(Hub(files, repo="acme/tiny")) as served:
        yield served


def test_hub_repository_is_exported_on_demand_and_served(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From end to end: a fake hub, the real exporter in its process, the real pipeline."""
    for name, value in {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "XDG_CACHE_HOME": str(tmp_path / "home" / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "store"
    folder.mkdir()
    residency = ModelSettings(allow_downloads=True, download_repos=("acme/*",))

    def load() -> ModelRegistry:
        opened = lambda path, manifest: load_pipeline(path, manifest, Execution("cpu", threads=1))  # noqa: E731
        return ModelRegistry.load(folder, opened, settings=residency)

    with (
        running(load, residency=residency) as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        it = Seen(server, channel, Memory())
        code, _ = failure(lambda: it.transform(repo_id="someone/tiny"))
        assert code == grpc.StatusCode.PERMISSION_DENIED
        call = it.images.Transform.future(request(model=pb.ModelReference(repo_id="acme/tiny")), timeout=800)
        told, ended = set(), threading.Event()
        call.add_done_callback(lambda _: ended.set())
        while not ended.wait(0.1):
            told |= {(model.id, model.state, model.detail.partition(":")[0]) for model in it.models.ListModels(model_pb2.ListModelsRequest()).models}  # fmt: skip  # noqa: E501
        assert ("acme--tiny", LOADING, "exporting") in told
        assert call.result().model_id == "acme--tiny"
        assert len(call.result().images[0].data) > 0
        model = it.get("acme--tiny")
        assert (model.state, model.engine, model.source.repo_id) == (READY, "onnx:cpu", "acme/tiny")
        assert model.memory_bytes > 0
    assert [path.name for path in folder.iterdir()] == ["acme--tiny"]
    assert json.loads((folder / "acme--tiny" / "manifest.json").read_text())["source"]["repo_id"] == "acme/tiny"

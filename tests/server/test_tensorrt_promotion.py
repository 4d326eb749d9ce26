"""TensorRT's promotion from end to end, with fakes for its libraries: a program that writes a file instead of its builder, and
sessions on the CPU instead of its engines; the server, the bundle, its images, the cache and the processes are real.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
from fake_candidate import WatchedStore
from img2img_client import Client
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.models.registry import EngineState
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.onnx.sessions import SessionOptions, open_session
from img2img_server.runtime.tensorrt.cache import EngineCache
from img2img_server.runtime.tensorrt.candidate import RunnerCache, TensorRTCandidate, Workshop
from PIL import Image
from running import running

Get = Callable[[str], Path]
MACHINE = {"gpu": "a GPU", "tensorrt": "101600"}

_BUILDER = """
import json, pathlib, sys
from img2img_server.runtime.tensorrt.build import read_job
job = read_job()
folder = pathlib.Path(job["folder"])
(folder / job["options"]["trt_ep_context_file_path"]).write_text(job["graph"])
timing = pathlib.Path(job["options"]["trt_timing_cache_path"])
(folder / "found").write_text(json.dumps([path.read_text() for path in timing.iterdir()]))
(timing / "kernels.timing").write_text("measured")
"""


@pytest.fixture
def contend(bundle: Get, tmp_path: Path) -> Callable[..., tuple[TensorRTCandidate, WatchedStore, list[str]]]:
    """A candidate, a store whose model is four times as slow, and the opened TensorRT sessions."""

    def get(spoilt: bool = False) -> tuple[TensorRTCandidate, WatchedStore, list[str]]:
        path, manifest = bundle("sd1"), read_manifest(bundle("sd1"))
        runner_cache, opened = RunnerCache(), list[str]()

        def open_graph(context: Path, options: SessionOptions) -> onnxruntime.InferenceSession:
            assert options.provider == "tensorrt"
            graph = Path(context.read_text())
            opened.append(graph.parent.name)
            return open_session(
                spoilt_unet(graph, tmp_path) if spoilt and graph.parent.name == "unet" else graph, SessionOptions()
            )

        serving = load_pipeline(path, manifest, Execution("cpu"), keep=runner_cache.keep)
        denoise = serving.denoise
        serving.denoise = lambda states: [denoise(states) for _ in range(4)][-1]  # type: ignore[method-assign]
        builder = [sys.executable, "-c", _BUILDER]
        shop = Workshop(
            Execution(), MACHINE, EngineCache(tmp_path / "engines"), Cache(0), runner_cache.make, "cpu", open_graph, builder
        )
        store = WatchedStore(serving)
        return TensorRTCandidate("m", path, manifest, serving.native_size, shop), store, opened

    return get


def spoilt_unet(graph: Path, folder: Path) -> Path:
    """A copy of the graph with no model's weights, as of an engine that computes wrongly."""
    for path in graph.parent.iterdir():
        if path.is_file():
            data = path.read_bytes()
            (folder / path.name).write_bytes(data if path.name == graph.name else bytes(len(data)))
    return folder / graph.name


def test_engines_are_built_checked_against_reference_images_and_promoted(
    contend: Callable[..., tuple[TensorRTCandidate, WatchedStore, list[str]]], tmp_path: Path
) -> None:
    candidate, store, opened = contend()
    image = Image.new("RGB", (64, 64), "teal")
    with (
        running(lambda: store, [candidate]) as server,
        Client(f"localhost:{server.port}", timeout=120) as client,
    ):
        before = client.transform(image, seed=1, num_inference_steps=2)
        ended = store.end()
        assert ended.state is EngineState.SERVING, ended
        after = client.transform(image, seed=1, num_inference_steps=2)
    assert (before.engine, after.engine) == ("onnx:cpu", "onnx:tensorrt")
    assert before.image.tobytes() == after.image.tobytes()
    assert opened == ["unet", "vae_decoder"]
    details = [status.detail for status in store.story]
    assert "building unet" in details
    assert "building vae_decoder" in details
    found = [json.loads(path.read_text()) for path in sorted((tmp_path / "engines").glob("*/found"))]
    assert sorted(found) == [[], ["measured"]], "the second part knows what was measured for the first"


def test_engine_with_different_images_is_rejected(
    contend: Callable[..., tuple[TensorRTCandidate, WatchedStore, list[str]]],
) -> None:
    candidate, store, _ = contend(spoilt=True)
    with running(lambda: store, [candidate]) as server, Client(f"localhost:{server.port}", timeout=120) as client:
        ended = store.end()
        assert ended.state is EngineState.REJECTED, ended
        assert client.transform(Image.new("RGB", (64, 64)), num_inference_steps=2).engine == "onnx:cpu"
        assert client.model("m").engines[0].state == "rejected"

"""Calls are recorded in warm-up, for the configured sizes, on the engine's thread."""

import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import FakeGpu
from img2img_server.bundle.manifest import Manifest, Source, read_manifest
from img2img_server.config import ModelSettings
from img2img_server.engine.cache import Cache
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Event, Failed, Request
from img2img_server.engine.warmup import WarmUp
from img2img_server.models.registry import ModelRegistry
from img2img_server.models.residency import Residency
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.providers.cuda_graphs import Replays
from PIL import Image

ENGINE = "img2img-engine"
"""The name of the engine's thread."""


@pytest.fixture(autouse=True)
def finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel computes anything there, so no image would be finite."""
    monkeypatch.setattr(torch, "isfinite", lambda tensor: torch.ones(tensor.shape, dtype=torch.bool))


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The thread of each recording that is made, by name."""
    names: list[str] = []
    record = Replays.record

    def noted(self: Replays, *arguments: Any) -> Any:
        names.append(threading.current_thread().name)
        return record(self, *arguments)

    monkeypatch.setattr(Replays, "record", noted)
    return names


def load(bundle: Path, manifest: Manifest) -> Any:
    return load_pipeline(bundle, manifest, Execution(provider="cuda", threads=1), Cache(0))


def run(engine: Engine, model: str, size: tuple[int, int], guidance: Sequence[float]) -> None:
    """Runs requests of that size together, each of two steps."""
    left, endings = threading.Semaphore(0), []

    def listen(event: Event) -> None:
        if isinstance(event, Completed | Failed):
            endings.append(event)
            left.release()

    for number, scale in enumerate(guidance):
        image = Image.new("RGB", size, (number, 0, 0))
        engine.submit(Request(model, image, f"prompt {number}", "blurred", 1.0, 2, scale, (number,)), listen)
    for _ in guidance:
        left.acquire()
    assert [type(ending) for ending in endings] == [Completed] * len(guidance)


def test_configured_sizes_are_recorded_in_warm_up_on_the_engine_s_thread(
    bundle: Callable[[str], Path], gpu: FakeGpu, threads: list[str]
) -> None:
    folder = bundle("sd1")
    pipeline = load(folder, read_manifest(folder))
    width, height = pipeline.native_size
    sizes = [(2 * width, height), (width, 2 * height)]
    engine = Engine({"m": pipeline})
    try:
        with gpu.counting() as counts:
            engine.call("m", lambda: WarmUp(16, 1.0, sizes=[*sizes, sizes[0]]).record("m", pipeline))
        # At four sizes the denoiser for five numbers of rows, both halves of the VAE for 1, 2, 4 images; texts for 1, 2, 4, 8.
        assert counts["cudaStreamBeginCapture"] == 4 * (5 + 2 * 3) + 4
        with gpu.counting() as counts:
            for size in sizes:
                for guidance in ([1.0], [7.5], [7.5, 1.0], [7.5] * 4):
                    run(engine, "m", size, guidance)
        assert counts["cudaStreamBeginCapture"] == counts["plan"] == 0
        assert counts["cudaGraphLaunch"] > 0
    finally:
        engine.close()
    assert set(threads) == {ENGINE}


async def test_model_loaded_at_run_time_is_recorded_on_the_engine_s_thread(
    bundle: Callable[[str], Path], gpu: FakeGpu, threads: list[str], tmp_path: Path
) -> None:
    """While another model is served: its first requests neither record nor plan."""
    for name in ("first", "second"):
        shutil.copytree(bundle("sd1"), tmp_path / "store" / name)
    settings = ModelSettings(preload=("first",))
    store = ModelRegistry.load(tmp_path / "store", load, settings=settings)
    engine = Engine(store.pipelines())
    residency = Residency(settings, store, engine, lambda name, serving: None, warm_up=WarmUp(16, 1.0))
    engine.start()
    await residency.start()
    try:
        assert [model.id for model in store if model.pipeline is not None] == ["first"]
        with gpu.counting() as counts:
            async with residency.using(Source(path="second")) as model:
                pipeline = model.pipeline
        assert pipeline is not None
        assert counts["cudaStreamBeginCapture"] == 2 * (5 + 2 * 3) + 4
        with gpu.counting() as counts:
            run(engine, "second", pipeline.native_size, [7.5] * 4)
        assert counts["cudaStreamBeginCapture"] == counts["plan"] == 0
        assert counts["cudaGraphLaunch"] > 0
    finally:
        await residency.close()
        engine.close()
    assert set(threads) == {ENGINE}

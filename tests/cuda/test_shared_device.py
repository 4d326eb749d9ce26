"""One device for all threads: models are loaded and unloaded beside recordings, memory is available again after an out of memory,
and all work is on one stream."""

import logging
import shutil
import threading
from collections.abc import Callable
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
from img2img_server.models.registry import ModelRegistry
from img2img_server.models.residency import Residency
from img2img_server.runtime.common.device_copy import device_stream
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.opaque.batch import Stepper
from PIL import Image


@pytest.fixture(autouse=True)
def finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel computes anything there, so no image would be finite."""
    monkeypatch.setattr(torch, "isfinite", lambda tensor: torch.ones(tensor.shape, dtype=torch.bool))


def load(bundle: Path, manifest: Manifest) -> Any:
    return load_pipeline(bundle, manifest, Execution(provider="cuda", threads=1), Cache(0))


def submit(engine: Engine, model: str, size: tuple[int, int], seed: int, listen: Callable[[Event], None]) -> None:
    image = Image.new("RGB", size, (seed % 256, 0, 0))
    engine.submit(Request(model, image, f"prompt {seed}", "blurred", 1.0, 2, 7.5, (seed,)), listen)


def endings_of(engine: Engine, model: str, size: tuple[int, int], count: int) -> list[Event]:
    """How `count` requests that come together end."""
    left = threading.Semaphore(0)
    endings: list[Event] = []

    def listen(event: Event) -> None:
        if isinstance(event, Completed | Failed):
            endings.append(event)
            left.release()

    for seed in range(count):
        submit(engine, model, size, seed, listen)
    for _ in range(count):
        left.acquire()
    return endings


async def test_recordings_survive_loading_and_unloading_of_models(
    bundle: Callable[[str], Path], gpu: FakeGpu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Findings 14 and 16: memory was freed and allocated during captures, which then failed; the fixture checks for violations.
    One model gets requests of ever new sizes, so that it records; another is loaded and unloaded meanwhile."""
    for name in ("a", "b"):
        shutil.copytree(bundle("sd1"), tmp_path / "store" / name)
    settings = ModelSettings(preload=("a",))
    store = ModelRegistry.load(tmp_path / "store", load, settings=settings)
    engine = Engine(store.pipelines())
    residency = Residency(settings, store, engine, lambda name, serving: None)
    engine.start()
    await residency.start()
    stop, endings = threading.Event(), []

    def traffic() -> None:
        number = 0
        while not stop.is_set():
            # Each size is recorded at its third call.
            size = (64 + 8 * (number // 2 % 12), 64)
            endings.extend(endings_of(engine, "a", size, 2))
            number += 1

    worker = threading.Thread(target=traffic)
    worker.start()
    try:
        with gpu.counting() as counts:
            for _ in range(3):
                async with residency.using(Source(path="b")):
                    pass
                await residency.unload("b")
    finally:
        stop.set()
        worker.join()
        await residency.close()
        engine.close()
    assert {type(ending) for ending in endings} == {Completed}
    assert counts["cudaStreamBeginCapture"] > 0
    assert "records no more CUDA graphs" not in caplog.text


def test_memory_is_available_again_after_an_out_of_memory(
    bundle: Callable[[str], Path], gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    """Finding 13: after one batch without room, requests that had room before had none."""
    folder = bundle("sd1")
    pipeline = load(folder, read_manifest(folder))
    engine = Engine({"m": pipeline})
    engine.start()
    try:
        assert [type(ending) for ending in endings_of(engine, "m", (64, 64), 1)] == [Completed]
        with gpu.memory(gpu.used + (24 << 20)), caplog.at_level(logging.WARNING):
            endings_of(engine, "m", (512, 512), 8)
            assert "out of memory" in caplog.text
            for _ in range(3):
                assert [type(ending) for ending in endings_of(engine, "m", (64, 64), 1)] == [Completed]
    finally:
        engine.close()


def test_stepper_runs_on_the_shared_stream_from_its_start() -> None:
    """Finding 11: it allocated on the default stream, and went over in the middle."""
    seen: list[torch.cuda.Stream] = []
    torch.zeros(1, device="cuda")

    def call(run: Stepper) -> list[Image.Image]:
        seen.append(torch.cuda.current_stream())
        return []

    Stepper(call).resume()
    assert seen == [device_stream()]

"""Device memory with several models: memory that is freed on an out of memory, and loading and unloading beside recorded
calls."""

import asyncio
import gc
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import FakeGpu
from img2img_server.bundle.manifest import Manifest, Source, read_manifest
from img2img_server.config import ModelSettings
from img2img_server.engine.cache import Cache
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Ending, Event, Failed, Pipeline, Request
from img2img_server.engine.warmup import WarmUp
from img2img_server.errors import OutOfMemory
from img2img_server.models.registry import ModelRegistry
from img2img_server.models.residency import Residency
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.providers.device_runner import DeviceRunner
from PIL import Image

ROWS = 4
"""The most rows of a call: few, so that few calls are recorded."""
ARENA_STEP = 4 << 20
"""Bytes that memory may differ by between two rounds: torch's allocator and ONNX Runtime's arenas grow in steps."""


@pytest.fixture(autouse=True)
def finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel computes anything there, so checks on the device find that no image is finite."""
    monkeypatch.setattr(torch, "isfinite", lambda tensor: torch.ones(tensor.shape, dtype=torch.bool))


def load(bundle: Path, manifest: Manifest | None = None, **settings: Any) -> Pipeline:
    execution = Execution(**{"provider": "cuda", "threads": 1, **settings})
    return load_pipeline(bundle, manifest or read_manifest(bundle), execution, Cache(0))


def request(model: str, size: tuple[int, int] = (64, 64), **settings: Any) -> Request:
    given = {"guidance_scale": 1.0, "num_inference_steps": 2, "strength": 1.0, "seeds": (0,), **settings}
    return Request(model, Image.new("RGB", size, "gray"), "a lake", None, **given)


class Waiting:
    """Requests of an engine that runs, and their endings in the order in which they were submitted."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(self, *requests: Request) -> list[Ending]:
        endings: dict[int, Ending] = {}
        left = threading.Semaphore(0)

        def listen(number: int) -> Callable[[Event], None]:
            def heard(event: Event) -> None:
                if isinstance(event, Completed | Failed):
                    endings[number] = event
                    left.release()

            return heard

        for number, asked in enumerate(requests):
            self._engine.submit(asked, listen(number))
        for _ in requests:
            left.acquire()
        return [endings[number] for number in range(len(requests))]


@pytest.fixture
def two(bundle: Callable[[str], Path]) -> Iterator[tuple[Waiting, dict[str, Pipeline]]]:
    """Two models on one engine, the calls of both recorded."""
    pipelines = {"a": load(bundle("sd1")), "b": load(bundle("sd1:fp16"))}
    engine = Engine(pipelines)
    for name, pipeline in pipelines.items():
        engine.call(name, lambda name=name, pipeline=pipeline: WarmUp(ROWS, 1.0).record(name, pipeline))  # type: ignore[misc]
    engine.start()
    yield Waiting(engine), pipelines
    engine.close()


def unet(pipeline: Any) -> DeviceRunner:
    runner: DeviceRunner = pipeline._pipe.unet._graph._runner
    return runner


def fail(pipeline: Pipeline, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the UNet run out of memory in its next calls."""
    runner, left = unet(pipeline), times
    run = runner.run

    def failing(feed: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise RuntimeError("CUDA failure 2: out of memory")
        return run(feed)

    monkeypatch.setattr(runner, "run", failing)


def launches(waiting: Waiting, model: str, gpu: FakeGpu) -> Counter[str]:
    """The device calls of a request of two steps at the model's own size."""
    with gpu.counting() as counts:
        (ending,) = waiting.run(request(model))
    assert isinstance(ending, Completed)
    return counts


@pytest.mark.parametrize(("failures", "others_keep"), [(1, True), (2, False)])
def test_other_models_keep_their_recordings_unless_their_memory_is_needed(
    failures: int, others_keep: bool, two: tuple[Waiting, dict[str, Pipeline]], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, pipelines = two
    recorded = {name: launches(waiting, name, gpu)["cudaGraphLaunch"] for name in pipelines}
    assert all(recorded.values())
    fail(pipelines["a"], failures, monkeypatch)
    (ending,) = waiting.run(request("a"))
    assert isinstance(ending, Completed), "it is tried again"
    assert launches(waiting, "a", gpu)["cudaGraphLaunch"] < recorded["a"]
    other = launches(waiting, "b", gpu)
    assert (other["cudaGraphLaunch"] == recorded["b"]) == others_keep
    for name in pipelines:
        for _ in range(3):
            waiting.run(request(name))
        assert launches(waiting, name, gpu)["cudaGraphLaunch"] == recorded[name], "recorded again"


def test_repeated_out_of_memory_fails_only_one_request(
    two: tuple[Waiting, dict[str, Pipeline]], monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, pipelines = two
    fail(pipelines["a"], 3, monkeypatch)
    (ending,) = waiting.run(request("a"))
    assert isinstance(ending, Failed)
    assert isinstance(ending.error, OutOfMemory)
    for name in pipelines:
        assert isinstance(waiting.run(request(name))[0], Completed)


def test_out_of_memory_in_a_batch_has_no_lasting_effect(bundle: Callable[[str], Path], gpu: FakeGpu) -> None:
    """With memory for one such request: of eight at the same time some may be refused; a single one afterwards never is."""
    large = request("m", (320, 320), guidance_scale=2.0)
    engine = Engine({"m": load(bundle("sd1"))})
    waiting = Waiting(engine)
    engine.start()
    try:
        assert isinstance(waiting.run(large)[0], Completed)
        with gpu.memory(gpu.used + (1 << 20)):
            for _ in range(3):
                endings = waiting.run(*[large] * 8)
                assert {type(ending.error) for ending in endings if isinstance(ending, Failed)} <= {OutOfMemory}
                for _ in range(2):
                    assert isinstance(waiting.run(large)[0], Completed)
    finally:
        engine.close()


def test_planning_a_request_makes_no_device_call(bundle: Callable[[str], Path], gpu: FakeGpu) -> None:
    """Each request is planned on its own thread, while the engine's thread may be recording."""
    pipeline = load(bundle("sd1"))
    names = ("cudaEventRecord", "cudaStreamWaitEvent", "cudaMalloc", "cudaMemcpyAsync", "cudaStreamSynchronize", "launch")
    before = [gpu.count(name) for name in names]
    thread = threading.Thread(target=lambda: pipeline.plan(request("m", guidance_scale=2.0, scheduler="DDIMScheduler")))
    thread.start()
    thread.join()
    assert [gpu.count(name) for name in names] == before


class Rig:
    """Models of a folder in a residency, as a server has them."""

    def __init__(self, folder: Path, settings: ModelSettings) -> None:
        self.store = ModelRegistry.find_bundles(folder, load, settings=settings)
        self.store.preload(settings)
        self.engine = Engine(self.store.pipelines())
        self.residency = Residency(settings, self.store, self.engine, lambda name, ready: None, warm_up=WarmUp(ROWS, 1.0))
        self.waiting = Waiting(self.engine)

    async def use(self, name: str, *requests: Request) -> list[Ending]:
        async with self.residency.using(Source(path=name)):
            return await asyncio.to_thread(self.waiting.run, *(requests or (request(name),)))


@asynccontextmanager
async def rig(folder: Path, **settings: Any) -> AsyncIterator[Rig]:
    made = Rig(folder, ModelSettings(**{"preload": ("none",), **settings}))
    made.engine.start()
    await made.residency.start()
    try:
        yield made
    finally:
        await made.residency.close()
        made.engine.close()


@pytest.fixture
def folder(bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    for name, made in {"a": "sd1", "b": "sd1:fp16", "c": "sd1:bf16"}.items():
        (tmp_path / name).symlink_to(bundle(made))
    return tmp_path


@pytest.fixture(autouse=True)
def started() -> None:
    """As a server starts the GPU before its first model."""
    torch.cuda.mem_get_info()


async def test_loading_and_unloading_do_not_disturb_recorded_calls(
    folder: Path, gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    """In rounds, while other requests are served and recorded at new sizes: no call and no recording is lost, all are freed, and
    memory is flat."""
    sizes = [(64, 64), (72, 64), (64, 72), (80, 64), (64, 80), (88, 64), (64, 88), (96, 64)]
    rounds, used = 6, []
    async with rig(folder) as it:
        await it.use("b")
        failed = Counter[str]()
        stop = asyncio.Event()

        async def load_on(name: str) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                asked = [request(name, sizes[(number + shift) % len(sizes)], guidance_scale=2.0) for shift in range(3)]
                for ending in await it.use(name, *asked):
                    if isinstance(ending, Failed):
                        failed[type(ending.error).__name__] += 1

        busy = [asyncio.create_task(load_on("b")) for _ in range(2)]
        for _ in range(rounds):
            assert all(isinstance(ending, Completed) for ending in await it.use("a"))
            await it.residency.unload("a")
            used.append(gpu.used)
        stop.set()
        await asyncio.gather(*busy)
        assert not failed
        before = gpu.count("cudaStreamBeginCapture")
        with gpu.counting() as counts:
            await it.use("b")
        assert counts["cudaGraphLaunch"] > 0
        assert gpu.count("cudaStreamBeginCapture") == before, "what was recorded is still there"
    assert "records no more CUDA graphs" not in caplog.text
    assert max(used[2:]) - min(used[2:]) <= ARENA_STEP, used


async def test_model_memory_is_measured_and_freed_on_unload(folder: Path, gpu: FakeGpu) -> None:
    async with rig(folder) as it:
        empty = gpu.used
        await it.use("a")
        model = it.store.get("a")
        assert model.pipeline is not None
        taken = gpu.used - empty
        assert abs(model.memory - taken) <= ARENA_STEP
        freed = await it.residency.unload("a")
        assert freed > taken / 2
        assert abs((gpu.used - empty) - (taken - freed)) <= ARENA_STEP
        assert gpu.used - empty < taken / 2, "though the test still holds the model"


async def test_memory_budget_is_the_gpus_memory(folder: Path, gpu: FakeGpu, caplog: pytest.LogCaptureFixture) -> None:
    """No bound is set: with room for two of three models, the least recently used one leaves."""
    async with rig(folder) as it:
        for name in "ab":
            await it.use(name)
        too_few = it.store.get("c").expected_memory - (1 << 20)
        with gpu.memory(gpu.used + too_few), caplog.at_level(logging.INFO):
            assert all(isinstance(ending, Completed) for ending in await it.use("c"))
        assert "model 'a' is evicted to load 'c'" in caplog.text
        assert it.store.get("a").pipeline is None
        assert it.store.get("b").pipeline is not None


async def test_load_that_runs_out_of_memory_evicts_other_models(
    folder: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate fits, and the load fails. The model is not loaded on the CPU instead."""
    monkeypatch.setattr("img2img_server.models.memory._FACTOR", 0.0)
    monkeypatch.setattr("img2img_server.models.memory._FIXED", 1)
    async with rig(folder) as it:
        it.store.folder.load = lambda bundle, manifest: load(bundle, manifest, provider="auto")  # type: ignore[union-attr]
        await it.use("a")
        with gpu.memory(gpu.used + (1 << 20)):
            assert all(isinstance(ending, Completed) for ending in await it.use("b"))
        pipeline = it.store.get("b").pipeline
        assert pipeline is not None
        assert pipeline.engine == "onnx:cuda"
        assert it.store.get("a").pipeline is None


def test_tiles_of_an_image_are_replayed(bundle: Callable[[str], Path], gpu: FakeGpu) -> None:
    """They have few shapes: from the third time on each call of the VAE is a recording's."""
    pipeline = load(bundle("sd1"), vae_memory=1)
    engine = Engine({"m": pipeline})
    waiting = Waiting(engine)
    engine.start()
    try:
        for _ in range(4):
            assert isinstance(waiting.run(request("m", (160, 112)))[0], Completed)
        with gpu.counting() as counts:
            assert isinstance(waiting.run(request("m", (160, 112)))[0], Completed)
        tiles = 4 * 3
        # Encoded and decoded in tiles, two steps of which PNDM runs one twice, and the prompt.
        assert counts["cudaGraphLaunch"] == 2 * tiles + 3 + 1
        assert counts["plan"] == counts["cudaStreamBeginCapture"] == 0
        assert not counts["cudaMalloc"]
    finally:
        engine.close()
        gc.collect()

"""Device calls of a step under a steady, mixed load, and constant memory, counted on fake CUDA libraries."""

import gc
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import nightly_but
from fake_gpu import PAGEABLE, WAITS, FakeGpu
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Event, Failed, Request
from img2img_server.engine.warmup import WarmUp
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from PIL import Image

MOST_ROWS = 16
TOGETHER = (3, 12, 1, 8, 12)
"""Requests that are in progress at the same time, in turn."""
MOST_LAUNCHES = {"sd1": 9, "sd1:fp16": 10, "sdxl:fp16": 10}
"""Kernels beside the recording in one step, independent of its requests."""
MOST_COPIES = {"sd1": 5, "sd1:fp16": 5, "sdxl:fp16": 7}
"""Copies within the device in one step."""
ROUNDS, MOST_ROUNDS = 4, 40
"""Groups of 125 requests: so many in a row with flat memory, within so many."""
SEGMENT = 2 << 20
"""Bytes by which torch's allocator grows: it may still do so once, as requests meet by chance."""


class Counted:
    """A pipeline whose steps are recorded: for each, the rows of its call and the device calls from the beginning of `denoise` to
    the end of `advance`, and during the wait for it."""

    def __init__(self, pipeline: Any, gpu: FakeGpu) -> None:
        self._pipeline = pipeline
        self._gpu = gpu
        self.steps: list[tuple[int, Counter[str]]] = []
        self._marked: Counter[str] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def denoise(self, states: Sequence[Any]) -> Sequence[Any]:
        with self._gpu.counting() as counts:
            result: Sequence[Any] = self._pipeline.denoise(states)
        self.steps.append((sum(len(rows) for noise in result for rows in noise), counts))
        self._marked = counts
        return result

    def mark(self) -> Callable[[], None]:
        wait, counts = self._pipeline.mark(), self._marked
        self._marked = None

        def counted() -> None:
            with self._gpu.counting() as found:
                wait()
            if counts is not None:  # else it is that of `prepare`
                counts.update(found)

        return counted

    def advance(self, states: Sequence[Any], noises: Sequence[Any]) -> None:
        with self._gpu.counting() as counts:
            self._pipeline.advance(states, noises)
        self.steps[-1][1].update(counts)


class Load:
    """Requests that come and go, of mixed steps, strength, guidance, schedulers and numbers of images."""

    def __init__(self, engine: Engine, pipeline: Any) -> None:
        self._engine = engine
        self._pipeline = pipeline
        self._random = random.Random(0)
        self._numbers = itertools.count()

    def run(self) -> None:
        """Runs 125 requests, always the same ones."""
        for together in TOGETHER:
            self._run(25, together)

    def _run(self, count: int, together: int) -> None:
        places, left, endings = threading.Semaphore(together), threading.Semaphore(0), []

        def listen(event: Event) -> None:
            if isinstance(event, Completed | Failed):
                endings.append(event)
                places.release()
                left.release()

        for _ in range(count):
            places.acquire()
            self._engine.submit(self._request(), listen)
        for _ in range(count):
            left.acquire()
        assert [ending for ending in endings if isinstance(ending, Failed)] == []

    def _request(self) -> Request:
        choose, number = self._random, next(self._numbers)
        return Request(
            "m",
            Image.new("RGB", self._pipeline.native_size, (number % 256, 0, 0)),
            f"prompt {choose.randrange(40)}",
            choose.choice([None, "blurred"]),
            choose.choice([0.5, 0.8, 1.0]),
            choose.randint(2, 6),
            choose.choice([1.0, 2.0, 7.5]),
            tuple(range(choose.choice([1, 1, 1, 2]))),
            scheduler=choose.choice([None, *self._pipeline.schedulers]),
            preview_interval=choose.choice([0, 0, 2]),
            image_digest=number.to_bytes(32),
        )


def allocated_bytes() -> int:
    """Bytes of device memory that torch's tensors have. Copies of schedulers are cyclic garbage after their requests."""
    gc.collect()
    return torch.cuda.memory_allocated()


def run_until_flat(engine: Engine, pipeline: Counted, gpu: FakeGpu) -> list[tuple[int, Counter[str]]]:
    """The steps of 500 further requests, in which torch's tensors take no more memory, and nothing is recorded.

    They are the same requests again, as the scheduler cache keeps each kind, but they meet in other ways: by chance more texts or
    images in one call than warm-up records, which is recorded at its third call and keeps memory from then on.
    """
    steps: list[tuple[int, Counter[str]]] = []
    allocated, reserved, rounds = engine.call("m", allocated_bytes), gpu.used, 0
    for _ in range(MOST_ROUNDS):
        pipeline.steps.clear()
        with gpu.counting() as counts:
            Load(engine, pipeline).run()
        assert sum(counts[name] for name in PAGEABLE) == 0, "neither sources nor previews nor images, either"
        now = engine.call("m", allocated_bytes)
        if counts["cudaStreamBeginCapture"]:
            allocated, reserved, steps, rounds = now, gpu.used, [], 0
            continue
        assert now == allocated
        assert gpu.used <= reserved + SEGMENT
        steps, rounds = [*steps, *pipeline.steps], rounds + 1
        if rounds == ROUNDS:
            return steps
    raise AssertionError(f"{MOST_ROUNDS} rounds, and something is still recorded")


@pytest.mark.parametrize("name", nightly_but(MOST_LAUNCHES, "sd1", "sd1:fp16"))
def test_a_step_is_one_launch_of_a_recording_and_memory_stays_flat(
    name: str, bundle: Callable[[str], Path], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No kernel computes anything there, so this would find that no image is finite.
    monkeypatch.setattr(torch, "isfinite", lambda tensor: torch.ones(tensor.shape, dtype=torch.bool))
    folder = bundle(name)
    # Without a cache, which would keep more and more.
    pipeline = Counted(load_pipeline(folder, read_manifest(folder), Execution(provider="cuda", threads=1), Cache(0)), gpu)
    ticks = itertools.count()
    # Every call takes about as long: so all that may share a call do.
    engine = Engine({"m": pipeline}, clock=lambda: float(next(ticks)))
    try:
        with gpu.counting() as counts:
            engine.call("m", lambda: WarmUp(MOST_ROWS, 1.0).record("m", pipeline))
        # At two sizes, the denoiser for five numbers of rows, both halves of the VAE for 1, 2 and 4; texts for 1, 2, 4 and 8.
        encoders = sum(component.name.startswith("text_encoder") for component in read_manifest(folder).components)
        assert counts["cudaStreamBeginCapture"] == 2 * (5 + 2 * 3) + 4 * encoders
        pipeline.steps.clear()
        Load(engine, pipeline).run()
        first = list(pipeline.steps)
        steps = run_until_flat(engine, pipeline, gpu)
    finally:
        engine.close()
    for _, counts in (*first, *steps):
        assert counts["cudaGraphLaunch"] == 1, counts
        assert counts["cudaStreamBeginCapture"] == counts["plan"] == 0, "all was recorded in warm-up"
    rows = {count for count, _ in steps}
    assert {1, 2, MOST_ROWS} < rows
    assert max(rows) == MOST_ROWS
    assert len(rows) >= 12, rows
    total: Counter[str] = Counter()
    for _, counts in steps:
        total.update(counts)
        assert sum(counts[name] for name in WAITS) == 1, counts
        assert counts["cudaMemcpyAsync device to device"] <= MOST_COPIES[name], counts
        assert counts["cudaMemcpyAsync to device, pinned"] <= 2, counts
    assert total["cudaMalloc"] == total["cudaFree"] == 0, total
    assert sum(total[name] for name in PAGEABLE) == total["cudaMemcpyAsync to host, pinned"] == 0, total
    assert max(counts["launch"] for _, counts in steps) == MOST_LAUNCHES[name]

"""Time of the engine's thread between two calls of the denoiser on a GPU, measured with fake CUDA libraries, without a GPU.

Requests of the same size and number of steps are in progress at the same time. Between two calls of the denoiser the engine's
thread reports the last step, chooses the next requests, and launches the work before and after the denoiser. A GPU is idle only
if that takes longer than a step; the fake kernels take no time. So each case runs twice: without device time, to measure the
thread, and with a device that takes --step-ms for a call of the denoiser, to measure its idle time.
"""

import argparse
import cProfile
import itertools
import pstats
import statistics
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

BUNDLE = Path(__file__).resolve().parent.parent / ".demo" / "models" / "demo"
_REQUESTS = (1, 4, 8, 16)
_LINES = 60
"""Functions shown of the profile."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    parser.add_argument("--bundle", type=Path, default=BUNDLE, metavar="DIR", help="a bundle (default: the demo model's)")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="steps of each request (default: %(default)s)")
    parser.add_argument(
        "--step-ms", type=float, default=3.0, metavar="MS", help="assumed duration of a step on a GPU (default: %(default)s)"
    )
    parser.add_argument(
        "--max-batch-size", type=int, default=16, metavar="N", help="maximum rows of a call (default: %(default)s)"
    )
    parser.add_argument("--profile", action="store_true", help="also print a profile with 8 guided requests")


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints a table. Returns 1 if the fake CUDA libraries are not in use."""
    import torch

    if not torch.cuda.is_available():
        print("the fake CUDA libraries are not in use: run scripts/bench host")
        return 1
    # The kernels compute nothing, so images would not be finite.
    torch.isfinite = lambda input: torch.ones(input.shape, dtype=torch.bool)
    bench = _Bench(arguments.bundle, arguments.max_batch_size)
    columns = ("requests", "guidance", "rows", "thread, µs", "of the quickest 10 %", "clock, µs", "device idle, µs")
    table = Table(
        *columns, title=f"between two calls of the denoiser; idle: a device that takes {arguments.step_ms:g} ms per call"
    )
    for guidance, count in itertools.product((7.5, 1.0), _REQUESTS):
        bench.run(count, guidance, 10)
        bench.run(count, guidance, arguments.steps)
        device = bench.device
        thread, clock = (
            [(after - before) / 1e3 for before, after in itertools.pairwise(of)] for of in (device.thread, device.clock)
        )
        rows = statistics.median(bench.rows)
        device.step = arguments.step_ms / 1e3
        bench.run(count, guidance, arguments.steps)
        device.step = 0.0
        numbers = (thread, clock, device.idle[1:])
        middle, wall, idle = (f"{statistics.median(each):.0f}" for each in numbers)
        quick = f"{statistics.quantiles(thread, n=10)[0]:.0f}"
        table.add_row(str(count), f"{guidance:g}", f"{rows:g}", middle, quick, wall, idle)
    Console(width=120).print(table)
    frames = bench.device.frames
    print(f"{len(frames)} frames from the engine's loop to a session's run: {' '.join(frames)}")
    if arguments.profile:
        bench.profile(8, 7.5, arguments.steps).sort_stats("cumulative").print_stats(_LINES)
    bench.close()
    return 0


class _Device:
    """A simulated GPU that takes `step` seconds for each call of the denoiser, in order, and no time for anything else.

    For each call, `thread` has the CPU time of the calling thread and `clock` the wall time, in nanoseconds, and `idle` the
    microseconds that the GPU was idle before it. `frames` is the call stack of the first call.
    """

    def __init__(self) -> None:
        self.step = 0.0
        self.frames: list[str] = []
        self._free = 0.0
        self.clear()

    def clear(self) -> None:
        """Clears the recorded calls."""
        self.thread: list[int] = []
        self.clock: list[int] = []
        self.idle: list[float] = []

    def call(self) -> None:
        """Records a call."""
        now = time.perf_counter()
        self.thread.append(time.thread_time_ns())
        self.clock.append(time.perf_counter_ns())
        self.idle.append(max(0.0, now - self._free) * 1e6)
        self._free = max(now, self._free) + self.step
        if not self.frames:
            names = [frame.name for frame in traceback.extract_stack()[:-2]]
            self.frames = names[names.index("_run") :] if "step" in names else []

    def waiting(self, wait: Callable[[], None]) -> Callable[[], None]:
        """Wraps `wait` to also wait until the simulated calls so far have ended."""
        over = self._free

        def waited() -> None:
            wait()
            if (left := over - time.perf_counter()) > 0:
                time.sleep(left)

        return waited


class _Session:
    """A session whose calls are recorded by the device."""

    def __init__(self, session: Any, device: _Device) -> None:
        self._session = session
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        """Records and makes a call."""
        self._device.call()
        self._session.run_with_iobinding(binding, options)


class _Pipeline:
    """A pipeline whose `mark` waits for the simulated device."""

    def __init__(self, pipeline: Any, device: _Device) -> None:
        self._pipeline = pipeline
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def mark(self) -> Callable[[], None]:
        """A function that waits for the device."""
        return self._device.waiting(self._pipeline.mark())


class _Bench:
    """An engine with a bundle on fake CUDA libraries, with CUDA graphs."""

    def __init__(self, bundle: Path, max_batch_size: int) -> None:
        from img2img_server.bundle.manifest import read_manifest
        from img2img_server.engine.cache import Cache
        from img2img_server.engine.engine import Engine
        from img2img_server.engine.interface import Span
        from img2img_server.engine.scheduler import QueueLimits
        from img2img_server.engine.warmup import WarmUp
        from img2img_server.runtime.execution import Execution
        from img2img_server.runtime.loader import load_pipeline
        from img2img_server.runtime.onnx.sessions import SessionOptions, open_session

        self.device = _Device()
        self.rows: list[int] = []
        """Values of each call of the denoiser in the last run."""

        def open_graph(graph: Path, options: SessionOptions) -> Any:
            session = open_session(graph, options)
            return _Session(session, self.device) if graph.parent.name.startswith(("unet", "transformer")) else session

        def observe(span: Span) -> None:
            if span.stage == "denoise":
                self.rows.append(span.rows)

        execution = Execution(provider="cuda", threads=1)
        pipeline: Any = load_pipeline(bundle, read_manifest(bundle), execution, Cache(1 << 28), open_graph)
        pipeline = _Pipeline(pipeline, self.device)
        self._size = pipeline.native_size
        self._engine = Engine({"m": pipeline}, QueueLimits(max_batch_size=max_batch_size), observe=observe)
        self._engine.call("m", lambda: WarmUp(max_batch_size, 1.0).record("m", pipeline))
        self.device.frames.clear()

    def run(self, count: int, guidance: float, steps: int) -> None:
        """Runs `count` requests concurrently. Raises the error of one if it failed."""
        from img2img_server.engine.request import Completed, Event, Failed, Request
        from PIL import Image

        left, failed = threading.Semaphore(0), []

        def listen(event: Event) -> None:
            if isinstance(event, Completed | Failed):
                failed.extend([event.error] if isinstance(event, Failed) else [])
                left.release()

        self.device.clear()
        self.rows.clear()
        for seed in range(count):
            image = Image.new("RGB", self._size, (seed, 0, 0))
            self._engine.submit(Request("m", image, f"prompt {seed}", None, 1.0, steps, guidance, (seed,)), listen)
        for _ in range(count):
            left.acquire()
        if failed:
            raise failed[0]

    def profile(self, count: int, guidance: float, steps: int) -> pstats.Stats:
        """A profile of the engine's thread in such a run."""
        profile = cProfile.Profile()
        self._engine.call("m", profile.enable)
        self.run(count, guidance, steps)
        self._engine.call("m", profile.disable)
        return pstats.Stats(profile)

    def close(self) -> None:
        """Stops the engine."""
        self._engine.close()

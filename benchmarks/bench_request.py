"""Measures one request at a time: the overhead of the server over its pipeline, and the time to start."""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

from img2img_client import Client
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT / ".demo" / "models" / "demo"
SOURCE = ROOT / "demo" / "images" / "noon-lake.png"
RESULT = ROOT / ".bench" / "bench.json"
PROMPT = "A beautiful landscape with mountains and a lake at sunset"
SEED = 7
_PAUSE = 0.1
"""Seconds between two calls, after which spinning threads of the first have stopped."""

_console = Console(stderr=True, highlight=False, markup=False)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    parser.add_argument("--bundle", type=Path, default=BUNDLE, metavar="DIR", help="a bundle (default: the demo model's)")
    parser.add_argument("--requests", type=int, default=30, metavar="N", help="rounds of the request comparison (default: 30)")
    parser.add_argument("--starts", type=int, default=5, metavar="N", help="server starts to time (default: 5)")


def run(arguments: argparse.Namespace) -> int:
    """Measures everything, prints a table and writes .bench/bench.json. Returns 0."""
    starts = [_time_start(arguments.bundle, number, arguments.starts) for number in range(1, arguments.starts + 1)]
    requests = _compare_requests(arguments.bundle, arguments.requests)
    helps = [_time_command([sys.executable, "-m", "img2img_cli", "--help"]) for _ in range(20)]
    figures = {
        "request through the server, ms": requests["server"],
        "same pipeline and codecs, called directly, ms": requests["direct"],
        "added by the server, round by round, ms": _pairs(requests, "server", "direct", lambda one, other: one - other),
        "both codecs alone, ms": requests["codecs"],
        "the pipeline alone, without codecs, ms": requests["pipeline"],
        "its session calls in a tight loop, ms": requests["sessions"],
        "the pipeline over its session calls": _pairs(requests, "pipeline", "sessions", lambda one, other: one / other),
        "the pipeline with a preview each step, ms": requests["previews"],
        "process start to SERVING, s": starts,
        "img2img --help, ms": helps,
    }
    _report(figures, requests["parts"])
    return 0


def _pairs(times: Mapping[str, list[float]], one: str, other: str, combine: Callable[[float, float], float]) -> list[float]:
    return [combine(first, second) for first, second in zip(times[one], times[other], strict=True)]


def _time_start(bundle: Path, number: int, count: int) -> float:
    """Seconds from the start of the server's process until it is SERVING."""
    _console.print(f"[bench] server start {number} of {count}")
    begun = time.perf_counter()
    with _server(bundle):
        return time.perf_counter() - begun


@contextlib.contextmanager
def _server(bundle: Path, *settings: str) -> Iterator[str]:
    """Starts a server of `bundle` with further flags for the block. Yields its address."""
    with tempfile.TemporaryDirectory() as folder:
        port_file = Path(folder) / "port"
        command = [sys.executable, "-m", "img2img_cli", "serve", "--models", str(bundle), "--port", "0", *settings]
        process = subprocess.Popen([*command, "--port-file", str(port_file)], stderr=subprocess.DEVNULL)
        try:
            while not port_file.exists():
                if process.poll() is not None:
                    raise SystemExit("bench: the server did not start")
                time.sleep(0.005)
            yield f"127.0.0.1:{port_file.read_text().strip()}"
        finally:
            process.terminate()
            process.wait(30)


def _compare_requests(bundle: Path, count: int) -> dict[str, Any]:
    """Milliseconds of the same transform by each way, in turns and in rotating order.

    The server's caches are off, because the other ways have none.
    """
    ways = _own_ways(bundle)
    data = SOURCE.read_bytes()
    with _server(bundle, "--cache-bytes", "0") as target, Client(target, timeout=60) as client:
        parts: list[dict[str, float]] = []

        def through_server() -> None:
            timings = client.transform(data, prompt=PROMPT, seed=SEED).timings
            parts.append({"queue": timings.queue_ms, "encode": timings.encode_ms, "denoise": timings.denoise_ms,
                          "decode": timings.decode_ms, "total": timings.total_ms})  # fmt: skip

        ways["server"] = through_server
        times: dict[str, Any] = {name: [] for name in ways}
        for call in ways.values():
            call()
        parts.clear()
        for round_ in range(count):
            _console.print(f"[bench] round {round_ + 1} of {count}")
            names = list(ways)
            for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                time.sleep(_PAUSE)
                begun = time.perf_counter()
                ways[name]()
                times[name].append((time.perf_counter() - begun) * 1e3)
    return {**times, "parts": {name: statistics.median(part[name] for part in parts) for name in parts[0]}}


def _own_ways(bundle: Path) -> dict[str, Callable[[], object]]:
    """The server's pipeline in this process: with codecs, without, with previews, and only its session calls."""
    from img2img_server.bundle.manifest import read_manifest
    from img2img_server.engine.request import Request, run_alone
    from img2img_server.images import ImageLimits, decode, encode
    from img2img_server.runtime.execution import Execution
    from img2img_server.runtime.loader import load_pipeline

    pipeline: Any = load_pipeline(bundle, read_manifest(bundle), Execution("cpu"))
    data = SOURCE.read_bytes()

    def request(interval: int = 0) -> Request:
        image = decode(data, ImageLimits(), "image")
        return Request("demo", image, PROMPT, None, 0.8, 25, 7.5, (SEED,), preview_interval=interval)

    def direct() -> None:
        (result,) = run_alone(pipeline, request())
        encode(result, "PNG", 90)

    def previews() -> None:
        (state,) = pipeline.prepare([watched])
        while state.step < state.step_count:
            pipeline.advance([state], pipeline.denoise([state]))
            pipeline.preview([state])
        pipeline.finish([state])

    plain, watched = request(), request(1)
    drawn = plain.image
    calls = _record(lambda: run_alone(pipeline, plain))
    return {
        "direct": direct,
        "codecs": lambda: (request(), encode(drawn, "PNG", 90)),
        "pipeline": lambda: run_alone(pipeline, plain),
        "sessions": lambda: [session.run(outputs, feed) for session, outputs, feed in calls],
        "previews": previews,
    }


def _record(work: Callable[[], object]) -> list[tuple[Any, Any, Any]]:
    """Records every session call of `work`: session, outputs, inputs."""
    from onnxruntime import InferenceSession

    calls: list[tuple[Any, Any, Any]] = []
    run = InferenceSession.run

    def recorded(session: InferenceSession, outputs: Any, feed: Any) -> Any:
        calls.append((session, outputs, feed))
        return run(session, outputs, feed)

    with mock.patch.object(InferenceSession, "run", recorded):
        work()
    return calls


def _time_command(command: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - begun) * 1e3


def _report(figures: Mapping[str, list[float]], parts: Mapping[str, float]) -> None:
    table = Table("figure", "median", "min", "max", "runs")
    for name, values in figures.items():
        row = (statistics.median(values), min(values), max(values))
        table.add_row(name, *(f"{value:.2f}" for value in row), str(len(values)))
    for name, value in parts.items():
        table.add_row(f"server's own timing: {name}, ms", f"{value:.2f}", "", "", "")
    Console().print(table)
    machine = {"date": date.today().isoformat(), "python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"machine": machine, "figures": dict(figures), "parts": dict(parts)}, indent=1) + "\n")
    _console.print(f"[bench] written to {RESULT.relative_to(ROOT)}")

"""The Python half of scripts/bench: side-by-side timings of the server, in one run. Run by `scripts/bench`, which see."""

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from img2img_client import Client
from PIL import Image
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT / ".demo" / "models" / "demo"
PICTURE = ROOT / "demo" / "pictures" / "noon-lake.png"
RESULT = ROOT / ".bench" / "bench.json"
PROMPT = "A beautiful landscape with mountains and a lake at sunset"
SEED = 7

_console = Console(stderr=True, highlight=False)


def main() -> None:
    """Measures everything, prints a table and writes the JSON file."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure the server on the demo model.")
    parser.add_argument("--requests", type=int, default=30, metavar="N", help="rounds of the request comparison (default: 30)")
    parser.add_argument("--starts", type=int, default=5, metavar="N", help="server starts that are timed (default: 5)")
    arguments = parser.parse_args()
    starts = [_time_start(number, arguments.starts) for number in range(1, arguments.starts + 1)]
    requests = _compare_requests(arguments.requests)
    helps = [_time_command([sys.executable, "-m", "img2img_cli", "--help"]) for _ in range(20)]
    added = [server - direct for server, direct in zip(requests["server"], requests["direct"], strict=True)]
    figures = {
        "request through the server, ms": requests["server"],
        "same pipeline called directly, ms": requests["direct"],
        "added by the server, pair by pair, ms": added,
        "optimum's pipeline called directly, ms": requests["optimum"],
        "process start to SERVING, s": starts,
        "img2img --help, ms": helps,
    }
    _report(figures, requests["parts"])


def _time_start(number: int, count: int) -> float:
    """Seconds from starting the server's process to its being SERVING."""
    _console.print(f"[bench] server start {number} of {count}")
    begun = time.perf_counter()
    with _server():
        return time.perf_counter() - begun


@contextlib.contextmanager
def _server() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        port_file = Path(folder) / "port"
        command = [sys.executable, "-m", "img2img_cli", "serve", "--models", str(BUNDLE), "--port", "0"]
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


def _compare_requests(count: int) -> dict[str, Any]:
    """Milliseconds of the same transform four ways, in turns; the order changes each round so that none is always first."""
    ways = {"direct": _direct(), "optimum": _optimum()}
    data = PICTURE.read_bytes()
    with _server() as target, Client(target, timeout=60) as client:
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
                begun = time.perf_counter()
                ways[name]()
                times[name].append((time.perf_counter() - begun) * 1e3)
    return {**times, "parts": {name: statistics.median(part[name] for part in parts) for name in parts[0]}}


def _direct() -> Callable[[], None]:
    """The server's own pipeline in this process, codecs included: what the server would cost if serving were free."""
    from img2img_server.bundle import read_manifest
    from img2img_server.engine.request import Request
    from img2img_server.images import ImageLimits, decode, encode
    from img2img_server.pipelines.alone import run_alone
    from img2img_server.pipelines.loader import load_pipeline

    pipeline = load_pipeline(BUNDLE, read_manifest(BUNDLE), "cpu")
    data = PICTURE.read_bytes()

    def call() -> None:
        image = decode(data, ImageLimits(), "image")
        (result,) = run_alone(pipeline, Request("demo", image, PROMPT, None, 0.8, 25, 7.5, (SEED,)))
        encode(result, "PNG", 90)

    return call


def _optimum() -> Callable[[], None]:
    """Optimum's pipeline on the same bundle, as its user would call it."""
    import torch
    from optimum.onnxruntime import ORTPipelineForImage2Image

    pipe = ORTPipelineForImage2Image.from_pretrained(str(BUNDLE), export=False)
    pipe.set_progress_bar_config(disable=True)

    def call() -> None:
        image = Image.open(PICTURE).convert("RGB")
        generator = torch.Generator().manual_seed(SEED)
        result = pipe(PROMPT, image=image, strength=0.8, num_inference_steps=25, guidance_scale=7.5, generator=generator)
        result.images[0].save(io.BytesIO(), "PNG", compress_level=1)

    return call


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


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    # Read by OpenMP when torch is loaded. Threads that spin while they wait would slow down whatever is measured next.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["DIFFUSERS_VERBOSITY"] = os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    main()

"""Session calls of a request to the demo model, with and without spinning threads of ONNX Runtime.

Each setting runs in its own process, in turns, because the threads of one would disturb the other.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT / ".demo" / "models" / "demo"
_SETTINGS = {"ONNX Runtime's default": "0", "session.force_spinning_stop": "1"}
_PARTS = ("text_encoder", "vae_encoder", "unet", "vae_decoder")
_TYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(int32)": "int32"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    parser.add_argument("--bundle", type=Path, default=BUNDLE, metavar="DIR", help="a bundle (default: the demo model's)")
    parser.add_argument("--requests", type=int, default=12, metavar="N", help="requests of each process (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="processes of each setting (default: %(default)s)")
    parser.add_argument("--child", choices=_SETTINGS.values(), help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Measures both settings and prints a table: medians over all requests, in milliseconds."""
    if arguments.child is not None:
        print(json.dumps({steps: _requests(arguments, steps) for steps in (20, 3)}))
        return 0
    times: dict[str, dict[str, list[list[float]]]] = {name: {"20": [], "3": []} for name in _SETTINGS}
    for _ in range(arguments.rounds):
        for name, value in _SETTINGS.items():
            words = [sys.executable, str(ROOT / "benchmarks" / "bench.py"), "sessions", "--child", value]
            words += ["--bundle", str(arguments.bundle), "--requests", str(arguments.requests)]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            for steps, measured in json.loads(done.stdout).items():
                times[name][steps] += measured
    table = Table("UNet calls", "setting", *_PARTS, "all", title="milliseconds a request, median")
    for steps in ("20", "3"):
        for name in _SETTINGS:
            parts = [statistics.median(column) for column in zip(*times[name][steps], strict=True)]
            table.add_row(steps, name, *(f"{part:.1f}" for part in parts), f"{sum(parts):.1f}")
    Console(width=120).print(table)
    return 0


def _requests(arguments: argparse.Namespace, steps: int) -> list[list[float]]:
    """Milliseconds of each part, for each request."""
    calls = [
        (
            _open(arguments.bundle / part / "model.onnx", arguments.child),
            2 if part in ("unet", "text_encoder") else 1,
            steps if part == "unet" else 1,
        )
        for part in _PARTS
    ]
    ready = [(session, _inputs(session, rows), times) for session, rows, times in calls]
    measured = []
    for _ in range(arguments.requests + 2):
        row = []
        for session, inputs, times in ready:
            begun = time.perf_counter()
            for _ in range(times):
                session.run(None, inputs)
            row.append((time.perf_counter() - begun) * 1e3)
        measured.append(row)
    return measured[2:]


def _open(graph: Path, stop: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.add_session_config_entry("session.force_spinning_stop", stop)
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def _inputs(session: Any, rows: int) -> dict[str, Any]:
    """Zeros of the shapes that a 128 x 128 image has."""
    import numpy as np

    side = 128 if session.get_inputs()[0].shape[1] == 3 else 16
    sizes = {"height": side, "width": side, "sequence_length": 32}
    feed = {}
    for item in session.get_inputs():
        shape = [size if isinstance(size, int) else _size(size, sizes, rows) for size in item.shape]
        feed[item.name] = np.zeros(shape, _TYPES[item.type])
    return feed


def _size(name: str, sizes: dict[str, int], rows: int) -> int:
    return next((size for key, size in sizes.items() if key in name), rows)

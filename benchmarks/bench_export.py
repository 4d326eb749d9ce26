"""Wall time and peak memory of `img2img export` for models of real size with random weights."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from bench_models import saved_model
from rich.console import Console
from rich.table import Table

_BENCH = Path(".bench")
_PAUSE = 0.05
_CASES = {
    "sd15-fp32": ("sd15", "fp32"),
    "sd15-fp16": ("sd15", "fp16"),
    "sdxl-unet-fp16": ("sdxl-unet", "fp16"),
    "klein-bf16": ("klein", "bf16"),
    "sd3-large-fp32": ("sd3-large", "fp32"),
}
"""The cases: a model, stored in the precision of its export."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of an export: seconds, and the memory peaks as in `Result`."""

    name: str
    seconds: float
    resident: int
    own: int


@dataclass(frozen=True, slots=True)
class Result:
    """One export, in seconds and bytes. `resident` is the peak of resident memory, including mapped files, `own` the peak without
    them. `largest` is the size of the largest graph's weights, `again` the time of the same command run again."""

    case: str
    seconds: float
    resident: int
    own: int
    largest: int
    bundle: int
    again: float
    stages: list[Stage]
    summary: str


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"cases, of {', '.join(_CASES)} (default: all)")
    parser.add_argument(
        "--limit",
        type=float,
        metavar="F",
        help="run in a memory cgroup of F x the largest component's weights (root only)",
    )
    parser.add_argument("--keep", action="store_true", help="keep the bundles, in .bench/bundles")


def run(arguments: argparse.Namespace) -> int:
    """Makes the models, exports each in its own process, and prints a table. Needs up to 20 GB of disk."""
    results = []
    for case in arguments.cases or _CASES:
        model, precision = _CASES[case]
        results.append(_measure(case, saved_model(model, precision), precision, arguments))
        (_BENCH / f"export-{case}.json").write_text(json.dumps(asdict(results[-1]), indent=1) + "\n")
    table = Table(
        "export", "wall", "peak resident", "of it not mapped", "largest graph", "ratio", "bundle", "again", title="exports"
    )
    for result in results:
        sizes = [f"{value / 1e9:.2f} GB" for value in (result.resident, result.own, result.largest)]
        ratio = f"{result.resident / result.largest:.2f}"
        table.add_row(
            result.case, f"{result.seconds:.0f} s", *sizes, ratio, f"{result.bundle / 1e9:.2f} GB", f"{result.again:.1f} s"
        )
    Console(width=140).print(table)
    for result in results:
        parts = Table("stage", "seconds", "peak resident", "of it not mapped", title=result.case)
        for stage in result.stages:
            parts.add_row(stage.name, f"{stage.seconds:.0f}", f"{stage.resident / 1e9:.2f} GB", f"{stage.own / 1e9:.2f} GB")
        Console(width=140).print(parts)
        print(result.summary)
    return 0


def _measure(case: str, model: Path, precision: str, arguments: argparse.Namespace) -> Result:
    output = _BENCH / "bundles" / case
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "img2img_cli", "export", str(model), "--output", str(output), "--precision", precision]
    samples: list[tuple[float, int, int]] = []
    begun = time.monotonic()
    lines = _BENCH / f"export-{case}.jsonl"
    limit = _Limit(model, arguments.limit) if arguments.limit else None
    export = [*command, "--json"]
    with lines.open("w") as file, subprocess.Popen(export, stdout=file, preexec_fn=limit.enter if limit else None) as process:
        known = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                memory = known.memory_info()
            except psutil.NoSuchProcess:
                break
            samples.append((time.monotonic() - begun, memory.rss, memory.rss - memory.shared))
            time.sleep(_PAUSE)
    seconds = time.monotonic() - begun
    events = [json.loads(line) for line in lines.read_text().splitlines()]
    if process.returncode == -signal.SIGKILL:
        raise SystemExit(f"{case}: the export was killed")
    if process.returncode:
        raise SystemExit(f"{case}: {events[-1].get('message')}")
    begins = [(event["text"], event["seconds"]) for event in events if event["event"] == "stage"]
    ends = [*(begin for _, begin in begins[1:]), seconds]
    stages = [
        Stage(name, end - start, *_peaks([sample for sample in samples if start <= sample[0] <= end]))
        for (name, start), end in zip(begins, ends, strict=True)
    ]
    largest = max(path.stat().st_size for path in output.glob("*/model.onnx_data"))
    bundle = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    summary = next(event for event in events if event["event"] == "result")
    begun = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    again = time.monotonic() - begun
    if not arguments.keep:
        shutil.rmtree(output)
    return Result(
        case, seconds, *_peaks(samples), largest, bundle, again, stages, json.dumps(summary["verification"]["pictures"])
    )


class _Limit:
    """A memory cgroup of version 1 or 2, without swap, of `factor` times a model's largest component."""

    def __init__(self, model: Path, factor: float) -> None:
        largest = max(sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in model.glob("*/"))
        old = Path("/sys/fs/cgroup/memory")
        self._group = (old if old.is_dir() else Path("/sys/fs/cgroup")) / "img2img-bench"
        self._group.mkdir(exist_ok=True)
        name = "memory.limit_in_bytes" if old.is_dir() else "memory.max"
        (self._group / name).write_text(str(round(factor * largest)))
        # Cached pages of the files would be charged to another cgroup.
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
        print(f"memory is limited to {factor * largest / 1e9:.2f} GB", flush=True)

    def enter(self) -> None:
        """Moves the calling process into it."""
        (self._group / "cgroup.procs").write_text(str(os.getpid()))


def _peaks(samples: list[tuple[float, int, int]]) -> tuple[int, int]:
    return max((sample[1] for sample in samples), default=0), max((sample[2] for sample in samples), default=0)

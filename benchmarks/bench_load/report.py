"""Output of the comparison: a table and a JSON file."""

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench_load.figures import Figures, Run, summarize
from bench_load.measuring import Results, Settings
from bench_load.trace import Trace, histogram, idle_share
from bench_load.workloads import WORKLOADS

PACKAGES = ("diffusers", "onnxruntime", "torch", "transformers", "grpcio", "numpy")


def figures(runs: Sequence[Run]) -> dict[str, dict[str, Figures]]:
    """Workload -> server -> figures."""
    names = dict.fromkeys((run.workload, run.server) for run in runs)
    found: dict[str, dict[str, Figures]] = {}
    for workload, server in names:
        found.setdefault(workload, {})[server] = summarize(
            [run for run in runs if (run.workload, run.server) == (workload, server)]
        )
    return found


def print_tables(results: Results, settings: Settings, console: Console) -> None:
    """Prints the comparison and the figures of the trace."""
    table = Table("workload", "server", "answers", "errors", "requests/s", "by round", "steps/s", "CPU", title="times in seconds")
    for column in ("p50", "p95", "p99", "waited, p50", ""):
        table.add_column(column)
    found = figures(results.runs)
    for workload in settings.workloads:
        for server in settings.servers:
            row = found[workload][server]
            first = server == settings.servers[0]
            rates = ("", "", "", "")
            if WORKLOADS[workload].foreground is None:
                rounds = " ".join(f"{value:.2f}" for value in row.per_round)
                rates = (f"{row.requests_per_second:.2f}", rounds, f"{row.steps_per_second:.1f}", f"{row.cpu_per_request:.2f}")
            times = (f"{value:.2f}" for value in (row.p50, row.p95, row.p99, row.queue_p50))
            note = _note(row)
            errors = str(row.errors or "")
            table.add_row(workload if first else "", server, str(row.requests), errors, *rates, *times, note)
        table.add_section()
    console.print(table)
    for name in settings.workloads:
        console.print(f"{name}: {WORKLOADS[name].title}")
    for name in settings.servers:
        console.print(f"{name}: {settings.description(name)}; its images differ by at most {results.differences[name]}/255")
    if results.trace is not None:
        for name, value in trace_figures(results.trace).items():
            console.print(f"trace of saturation: {name}: {value}")


def trace_figures(trace: Trace) -> dict[str, Any]:
    """Batch sizes, idle time and times by kind of call, from a trace."""
    totals = dict.fromkeys((call.name for call in trace.calls), 0.0)
    for call in trace.calls:
        totals[call.name] += call.seconds
    return {
        "rows in a call of the denoiser -> calls": histogram(trace.calls, "rows"),
        "requests in a call of the denoiser -> calls": histogram(trace.calls, "requests"),
        "share of time without a model call": round(idle_share(trace.calls), 4),
        "seconds by call": {name: round(value, 3) for name, value in totals.items()},
        "caches": trace.caches,
    }


def write(path: Path, results: Results, settings: Settings) -> None:
    """Writes settings, figures and the record of every request. NaN becomes null."""
    content = {
        "machine": machine(),
        "settings": {key: value for key, value in asdict(settings).items() if key != "folder"},
        "calibration": {"units_per_second": results.speed, "requests_per_second": results.requests_per_second},
        "largest_difference_of_255": results.differences,
        "figures": {
            workload: {server: asdict(row) for server, row in rows.items()} for workload, rows in figures(results.runs).items()
        },
        "trace": trace_figures(results.trace) if results.trace else None,
        "records": [
            {"server": run.server, "workload": run.workload, "round": run.round, **asdict(record)}
            for run in results.runs
            for record in run.records
        ],
    }
    path.write_text(json.dumps(_without_nan(content), allow_nan=False) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """The machine, and the versions of Python and packages."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "load_average_at_the_end": os.getloadavg(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def _note(row: Figures) -> str:
    notes = []
    if not math.isnan(row.alone_p50):
        notes.append(f"{row.alone_p50:.2f} s alone: {row.p50 / row.alone_p50:.1f} x")
    if not math.isnan(row.estimate_error):
        notes.append(f"error of estimate {row.estimate_error:.0%}")
    return ", ".join(notes)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value

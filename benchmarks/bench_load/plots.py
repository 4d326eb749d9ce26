"""Plots of the comparison: latency CDFs, throughput, batch sizes and a part of the engine's timeline."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from bench_load.figures import MEASURED, Run
from bench_load.measuring import Results, Settings
from bench_load.report import figures
from bench_load.trace import Call, Trace, histogram
from bench_load.workloads import WORKLOADS

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

COLORS = {"ours": "#0b6e4f", "lock": "#c1666b", "batching": "#e0a030", "pytorch": "#5b7db1"}
CALL_COLORS = {"prepare": "#e0a030", "denoise": "#0b6e4f", "advance": "#9aa5b1", "preview": "#8e6bbf", "finish": "#c1666b"}
TIMELINE_SECONDS = 2.0
COLUMNS = 3


def draw(path: Path, results: Results, settings: Settings) -> None:
    """Writes one PNG file."""
    count = len(settings.workloads) + 1 + (3 if results.trace else 0)
    rows = -(-count // COLUMNS)
    figure, grid = plt.subplots(rows, COLUMNS, figsize=(5.2 * COLUMNS, 3.4 * rows), squeeze=False, layout="constrained")
    free = [axes for row in grid for axes in row]
    for workload in settings.workloads:
        _draw_latencies(free.pop(0), workload, settings.servers, results.runs)
    _draw_throughput(free.pop(0), results, settings)
    if results.trace:
        _draw_histogram(free.pop(0), results.trace, "rows")
        _draw_histogram(free.pop(0), results.trace, "requests")
        _draw_timeline(free.pop(0), results.trace.calls)
    for axes in free:
        axes.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_latencies(axes: Axes, workload: str, servers: Sequence[str], runs: Sequence[Run]) -> None:
    for server in servers:
        mine = [run for run in runs if (run.workload, run.server) == (workload, server)]
        latencies = sorted(each.latency for run in mine for each in run.records if each.role in MEASURED and not each.error)
        if latencies:
            shares = [(number + 1) / len(latencies) for number in range(len(latencies))]
            axes.step(latencies, shares, where="post", label=server, color=COLORS[server])
    axes.set(
        title=f"{workload}: {WORKLOADS[workload].title}",
        xlabel="latency, s",
        ylabel="share of requests",
        xscale="log",
        ylim=(0, 1.02),
    )
    axes.title.set_fontsize(9)
    for which in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        which(FuncFormatter(_second_label))
    axes.tick_params(axis="x", which="both", labelsize=7)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)


def _second_label(seconds: float, _position: int | None) -> str:
    """Labels 1, 2 and 5 of each decade."""
    return f"{seconds:g}" if f"{seconds:e}"[0] in "125" else ""


def _draw_throughput(axes: Axes, results: Results, settings: Settings) -> None:
    found = figures(results.runs)
    names = [name for name in settings.workloads if WORKLOADS[name].concurrency and WORKLOADS[name].foreground is None]
    width = 0.8 / len(settings.servers)
    for index, server in enumerate(settings.servers):
        places = [place + index * width for place in range(len(names))]
        rates = [found[name][server].requests_per_second for name in names]
        axes.bar(places, rates, width, label=server, color=COLORS[server])
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(names))], names, fontsize=8)
    axes.set(title="throughput of the closed loops", ylabel="requests/s")
    axes.legend(fontsize=8)


def _draw_histogram(axes: Axes, trace: Trace, of: str) -> None:
    counted = histogram(trace.calls, of)
    axes.bar(list(counted), list(counted.values()), color=CALL_COLORS["denoise"])
    axes.set(title=f"saturation, ours: {of} in a call of the denoiser", xlabel=of, ylabel="calls")


def _draw_timeline(axes: Axes, calls: Sequence[Call]) -> None:
    """The calls of two seconds in the middle, one line per kind. The numbers are UNet rows."""
    if not calls:
        return
    middle = (calls[0].start + max(call.end for call in calls)) / 2
    start = max(calls[0].start, middle - TIMELINE_SECONDS / 2)
    shown = [call for call in calls if call.end >= start and call.start <= start + TIMELINE_SECONDS]
    kinds = [name for name in CALL_COLORS if any(call.name == name for call in shown)]
    for place, name in enumerate(kinds):
        bars = [(call.start - start, call.seconds) for call in shown if call.name == name]
        axes.broken_barh(bars, (place - 0.4, 0.8), color=CALL_COLORS[name], edgecolor="white", linewidth=0.3)
    for call in shown:
        if call.name == "denoise" and call.seconds > TIMELINE_SECONDS / 40:
            x = call.start - start + call.seconds / 2
            axes.text(
                x, kinds.index("denoise"), str(call.rows), ha="center", va="center", fontsize=6, color="white", clip_on=True
            )
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set(title="saturation, ours: timeline of the engine", xlabel="s", xlim=(0, TIMELINE_SECONDS))

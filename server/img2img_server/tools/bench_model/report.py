"""What `img2img bench-model` measured, as a table, as JSON and as a drawing. Standard library and rich; matplotlib to draw."""

import dataclasses
import importlib.util
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from img2img_server.tools.bench_model.measuring import TimedCase

_PLOTS = (".png", ".svg")


@dataclass(frozen=True, slots=True)
class Line:
    """One case, of size 0 x 0 where that makes no difference.

    Seconds of the median and the quartiles; `ratio` is how much quicker than the last provider of the same case, the median
    over the rounds; `operations` of a run, `rate` of them a second, `share` of the peak's: None where they were not counted.
    """

    component: str
    provider: str
    width: int
    height: int
    rows: int
    arithmetic: str
    median: float
    lower: float
    upper: float
    ratio: float
    operations: int | None
    rate: float | None
    share: float | None
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """A run: what was measured of which bundle, on which machine, when, and in how many rounds. `peaks` are the machine's."""

    bundle: str
    date: str
    machine: dict[str, str]
    rounds: int
    lines: tuple[Line, ...]
    peaks: tuple[Line, ...]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper one, between neighbours in proportion."""
    ordered = sorted(values)
    found = []
    for part in (0.25, 0.5, 0.75):
        place = part * (len(ordered) - 1)
        low = ordered[int(place)]
        high = ordered[min(int(place) + 1, len(ordered) - 1)]
        found.append(low + (high - low) * (place - int(place)))
    return found[0], found[1], found[2]


def summarize(cases: "Sequence[TimedCase]", bundle: str) -> Report:
    """Medians, quartiles and shares of the cases that were measured at all."""
    from img2img_server.runtime.common.cpu import machine
    from img2img_server.tools.bench_model.measuring import PEAK
    from img2img_server.tools.bench_model.variants import device_of

    measured = [case for case in cases if case.seconds]
    rates = {(case.provider, case.arithmetic): _rate(case) for case in measured if case.component == PEAK}
    lines: list[Line] = []
    peaks: list[Line] = []
    for case in measured:
        lower, median, upper = quartiles(case.seconds)
        rate, peak = _rate(case), rates.get((device_of(case.provider), case.arithmetic))
        same = [other for other in measured if _key(other) == _key(case)]
        line = Line(
            case.component, case.provider, *case.size, case.rows, case.arithmetic, median, lower, upper,
            _ratio(same[-1].seconds, case.seconds), case.operations, rate,
            rate / peak if rate is not None and peak else None, tuple(case.seconds),
        )  # fmt: skip
        (peaks if case.component == PEAK else lines).append(line)
    date = time.strftime("%Y-%m-%d %H:%M:%S")
    rounds = max((len(case.seconds) for case in measured), default=0)
    return Report(bundle, date, machine(), rounds, tuple(lines), tuple(peaks))


def print_table(report: Report) -> None:
    """Prints it to stdout, one part after the other."""
    from rich.console import Console
    from rich.table import Table

    title = f"{report.bundle}: medians and quartiles of {report.rounds} rounds"
    table = Table(title=title)
    for name in ("part", "size", "rows", "provider", "ms", "quartiles", "ms a row", "ratio", "TFLOP/s", "share"):
        table.add_column(name, justify="left" if name in ("part", "size", "provider") else "right", no_wrap=True)
    for section in _sections(report.lines):
        for line in section:
            table.add_row(
                line.component,
                f"{line.width} x {line.height}" if line.width else "any",
                str(line.rows),
                line.provider,
                *(_milliseconds(line.median), f"{_milliseconds(line.lower)} to {_milliseconds(line.upper)}"),
                *(_milliseconds(line.median / line.rows), f"{line.ratio:.2f}"),
                "" if line.rate is None else f"{line.rate / 1e12:.3g}",
                "" if line.share is None else f"{line.share:.0%}",
            )
        table.add_section()
    console = Console(width=max(120, Console().width))
    console.print(table)
    for peak in report.peaks:
        assert peak.rate is not None, "a peak's operations are known"
        console.print(f"peak of {peak.provider} in {peak.arithmetic}: {peak.rate / 1e12:.3g} TFLOP/s", highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in report.machine.items()), highlight=False)


def write_json(report: Report, path: Path) -> None:
    """Writes everything, each round's seconds too."""
    path.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n", encoding="utf-8")


def check_plot(path: Path | None) -> None:
    """Raises ValueError before anything is measured, where `path` could not be drawn."""
    if path is None:
        return
    if path.suffix not in _PLOTS:
        raise ValueError(f"--plot writes {' and '.join(_PLOTS)}, not '{path.name}'")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")


def draw(report: Report, path: Path) -> None:
    """Draws a panel for each part: medians by size and rows, a bar for each provider, whiskers at the quartiles."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    sections = list(_sections(report.lines))
    providers = list(dict.fromkeys(line.provider for line in report.lines))
    figure, panels = pyplot.subplots(1, max(1, len(sections)), figsize=(3.2 * max(1, len(sections)), 3.6), squeeze=False)
    for panel, lines in zip(panels[0], sections, strict=False):
        places = list(dict.fromkeys((line.width, line.height, line.rows) for line in lines))
        for index, provider in enumerate(providers):
            own = [line for line in lines if line.provider == provider]
            _bars(panel, own, [places.index((line.width, line.height, line.rows)) for line in own], index, len(providers))
        panel.set_title(lines[0].component)
        panel.set_xticks(range(len(places)), [_tick(*place) for place in places], fontsize=7)
        panel.set_ylim(bottom=0)
    panels[0][0].set_ylabel("milliseconds")
    panels[0][0].legend(fontsize=7)
    figure.suptitle(report.bundle)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _bars(panel: Any, lines: Sequence[Line], places: Sequence[int], index: int, count: int) -> None:
    if not lines:
        return
    width = 0.8 / count
    whiskers = [[(line.median - line.lower) * 1e3 for line in lines], [(line.upper - line.median) * 1e3 for line in lines]]
    at = [place + (index - (count - 1) / 2) * width for place in places]
    panel.bar(at, [line.median * 1e3 for line in lines], width, yerr=whiskers, label=lines[0].provider)


def _tick(width: int, height: int, rows: int) -> str:
    return f"{width}x{height}\n{rows} rows" if width else f"{rows} rows"


def _sections(lines: Sequence[Line]) -> Iterator[list[Line]]:
    """The lines part by part; within one by size and rows, so that providers stand beside each other."""
    for component in dict.fromkeys(line.component for line in lines):
        own = [line for line in lines if line.component == component]
        yield sorted(own, key=lambda line: (line.width * line.height, line.rows))


def _key(case: "TimedCase") -> tuple[str, tuple[int, int], int]:
    return case.component, case.size, case.rows


def _rate(case: "TimedCase") -> float | None:
    return None if case.operations is None else case.operations / statistics.median(case.seconds)


def _ratio(reference: Sequence[float], own: Sequence[float]) -> float:
    """Round by round, since what disturbs a round disturbs both. A run that was cut short may have one more of one."""
    return statistics.median(theirs / ours for theirs, ours in zip(reference, own, strict=False))


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"

"""`img2img bench-model BUNDLE`: measures a bundle's graphs and a whole step on this machine, by provider, size and rows."""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from img2img_server.runtime.execution import PROVIDERS, Execution
from img2img_server.settings.setting import build, settings_of
from img2img_server.settings.sources import declare, given

if TYPE_CHECKING:
    from img2img_server.bundle.manifest import Manifest
    from img2img_server.engine.request import Pipeline
    from img2img_server.tools.bench_measuring import TimedCase

_MIN_ROUNDS = 3
_PLOTS = (".png", ".svg")
_EXECUTION = tuple(one for one in settings_of(Execution) if one.name in ("threads", "arithmetic", "buckets", "cuda_graphs"))
"""Settings with the same flags as in `img2img serve`."""

_EPILOG = """\
examples:
  img2img bench-model models/my-model
  img2img bench-model models/my-model --providers cpu,openvino --sizes 256,512 --rows 1,2,4 --seconds 120
  img2img bench-model models/my-model --json bench.json --plot bench.png

All providers are opened as by `img2img serve`, at the same time, each with its own memory. Then each round measures all variants
once, so that other load on the machine affects all of them alike. There are at least three rounds. Ctrl-C prints the results so
far.

A row is one sample of a batch; an image with guidance takes two. "step" is one step of a request, including the scheduler.
"ratio" is the speed relative to the last provider of the same part, size and rows.
Exit status: 0 success, 1 failure, 2 wrong arguments, 130 interrupted by Ctrl-C.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", type=Path, help="directory of the bundle")
    providers = f"providers to measure, of {', '.join(PROVIDERS)} (default: all available)"
    add("--providers", type=_providers, default=(), metavar="P,...", help=providers)
    add("--sizes", type=_sizes, default=(), metavar="N,WxH,...", help="image sizes in pixels (default: the model's native size)")
    add("--rows", type=_rows, default=(1, 2), metavar="N,...", help="rows per call (default: 1,2)")
    add("--seconds", type=float, default=30.0, metavar="N", help="duration, excluding loading (default: %(default)s)")
    declare(parser, _EXECUTION)
    add("--json", type=Path, metavar="FILE", help="write all measurements to this file")
    add("--plot", type=Path, metavar="FILE", help="write a plot to this .png or .svg file (needs matplotlib)")


def run(arguments: argparse.Namespace) -> int:
    """Measures and reports. Returns the exit status."""
    # Read by libraries when they are imported, as in `img2img serve`.
    own = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for name, value in {**own, "OMP_WAIT_POLICY": "PASSIVE"}.items():
        os.environ.setdefault(name, value)
    from img2img_server.bundle.manifest import read_manifest
    from img2img_server.errors import BundleError

    try:
        _check_plot(arguments.plot)
        manifest = read_manifest(arguments.bundle)
        pipelines = _open(arguments, manifest)
        cases = _cases(arguments, pipelines)
        interrupted = _measure(cases, arguments.seconds, tuple(pipelines))
    except (BundleError, OSError, ValueError) as error:
        print(f"img2img bench-model: {error}", file=sys.stderr)
        return 1
    report = summarize(cases, str(arguments.bundle))
    _print_table(report)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        _draw(report, arguments.plot)
    return 130 if interrupted else 0


def _open(arguments: argparse.Namespace, manifest: "Manifest") -> "dict[str, Pipeline]":
    """The pipeline of each provider. Unavailable providers are skipped with a message, unless they were requested by name."""
    from img2img_server.engine.cache import Cache
    from img2img_server.errors import BundleError
    from img2img_server.runtime.loader import load_pipeline

    pipelines: dict[str, Pipeline] = {}
    # In a server TensorRT replaces CUDA in the background, so it is only measured if requested.
    for provider in arguments.providers or [name for name in PROVIDERS if name != "tensorrt"]:
        _note(f"opening {arguments.bundle} on {provider}")
        execution = build(Execution, {**given(_EXECUTION, arguments), ("provider",): provider})
        try:
            pipelines[provider] = load_pipeline(arguments.bundle, manifest, execution, Cache(2**26))
        except BundleError as error:
            if arguments.providers:
                raise
            _note(f"skipping {provider}: {error}")
    if not pipelines:
        raise BundleError(f"no available provider can run {arguments.bundle}")
    return pipelines


def _cases(arguments: argparse.Namespace, pipelines: "dict[str, Pipeline]") -> "list[TimedCase]":
    """Everything to be measured, each run once. Variants that a provider does not support are skipped with a message."""
    from img2img_server.errors import BundleError
    from img2img_server.tools.bench_measuring import cases_of

    first = next(iter(pipelines.values()))
    sizes = arguments.sizes or (first.native_size,)
    for size in sizes:
        if any(side % first.size_multiple for side in size):
            raise ValueError(f"{size[0]} x {size[1]}: this model's sizes are multiples of {first.size_multiple}")
    opened = pipelines.items()
    cases = [case for provider, pipeline in opened for case in cases_of(provider, pipeline, sizes, arguments.rows, _note)]
    if not cases:
        raise BundleError("nothing could be measured")
    return cases


def _measure(cases: "list[TimedCase]", seconds: float, providers: Sequence[str]) -> bool:
    """Runs rounds over all cases for `seconds`. Returns whether Ctrl-C interrupted it."""
    from img2img_server.tools.bench_measuring import run_rounds, synchronizer

    begun = time.monotonic()
    try:
        for number, _ in enumerate(run_rounds(cases, synchronizer(providers), time.perf_counter), start=1):
            passed = time.monotonic() - begun
            _note(f"round {number}, {passed:.0f} of {seconds:.0f} s", progress=True)
            if number >= _MIN_ROUNDS and passed >= seconds:
                break
    except KeyboardInterrupt:
        return True
    finally:
        if sys.stderr.isatty():
            print(file=sys.stderr)
        for case in cases:
            case.work.close()
    return False


def _note(text: str, progress: bool = False) -> None:
    """Prints a line to stderr. A `progress` line overwrites itself, and is only printed on a terminal."""
    if not progress:
        print(text, file=sys.stderr)
    elif sys.stderr.isatty():
        print(f"\r{text} ", end="", file=sys.stderr, flush=True)


def _providers(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in PROVIDERS:
            raise argparse.ArgumentTypeError(f"'{name}' is not one of {', '.join(PROVIDERS)}")
    return names


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    return tuple(dict.fromkeys(_size(word) for word in text.split(",")))


def _size(word: str) -> tuple[int, int]:
    width, times, height = word.partition("x")
    numbers = (width, height if times else width)
    if not all(number.isascii() and number.isdigit() and int(number) > 0 for number in numbers):
        raise argparse.ArgumentTypeError(f"'{word}' is not a size such as 512 or 768x512")
    return int(numbers[0]), int(numbers[1])


def _rows(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of row counts such as 1,2,4")
    return tuple(dict.fromkeys(map(int, words)))


@dataclass(frozen=True, slots=True)
class TimedLine:
    """The result of one case; its size is 0 x 0 if the size makes no difference.

    `median`, `lower` and `upper` quartile are in seconds. `ratio` is the speed relative to the last provider of the same case,
    the median over the rounds.
    """

    component: str
    provider: str
    width: int
    height: int
    rows: int
    median: float
    lower: float
    upper: float
    ratio: float
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """The results of a run: bundle, date, machine, number of rounds, and a line per case."""

    bundle: str
    date: str
    machine: dict[str, str]
    rounds: int
    lines: tuple[TimedLine, ...]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile, interpolated linearly."""
    first, second, third = statistics.quantiles(values if len(values) > 1 else [*values, *values], n=4, method="inclusive")
    return first, second, third


def summarize(cases: "Sequence[TimedCase]", bundle: str) -> Report:
    """Medians, quartiles and ratios of the cases that were measured at least once."""
    from img2img_server.runtime.common.cpu import machine

    measured = [case for case in cases if case.seconds]
    lines = []
    for case in measured:
        lower, median, upper = quartiles(case.seconds)
        same = [other for other in measured if _key(other) == _key(case)]
        ratio = _ratio(same[-1].seconds, case.seconds)
        lines.append(
            TimedLine(case.component, case.provider, *case.size, case.rows, median, lower, upper, ratio, tuple(case.seconds))
        )
    rounds = max((len(case.seconds) for case in measured), default=0)
    return Report(bundle, time.strftime("%Y-%m-%d %H:%M:%S"), machine(), rounds, tuple(lines))


def _print_table(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report.bundle}: medians and quartiles of {report.rounds} rounds")
    for name in ("part", "size", "rows", "provider", "ms", "quartiles", "ms per row", "ratio"):
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
            )
        table.add_section()
    console = Console(width=max(120, Console().width))
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in report.machine.items()), highlight=False)


def _check_plot(path: Path | None) -> None:
    """Raises ValueError if a plot could not be written to `path`."""
    if path is None:
        return
    if path.suffix not in _PLOTS:
        raise ValueError(f"--plot writes {' and '.join(_PLOTS)}, not '{path.name}'")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")


def _draw(report: Report, path: Path) -> None:
    """Draws a panel per part: medians by size and rows, a bar per provider, whiskers at the quartiles."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    sections = list(_sections(report.lines))
    providers = list(dict.fromkeys(line.provider for line in report.lines))
    figure, panels = pyplot.subplots(1, max(1, len(sections)), figsize=(3.2 * max(1, len(sections)), 3.6), squeeze=False)
    for panel, lines in zip(panels[0], sections, strict=False):
        ticks = list(dict.fromkeys((line.width, line.height, line.rows) for line in lines))
        for index, provider in enumerate(providers):
            own = [line for line in lines if line.provider == provider]
            _bars(panel, own, [ticks.index((line.width, line.height, line.rows)) for line in own], index, len(providers))
        panel.set_title(lines[0].component)
        panel.set_xticks(range(len(ticks)), [_tick(*tick) for tick in ticks], fontsize=7)
        panel.set_ylim(bottom=0)
    panels[0][0].set_ylabel("milliseconds")
    panels[0][0].legend(fontsize=7)
    figure.suptitle(report.bundle)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _bars(panel: Any, lines: Sequence[TimedLine], ticks: Sequence[int], index: int, count: int) -> None:
    if not lines:
        return
    width = 0.8 / count
    whiskers = [[(line.median - line.lower) * 1e3 for line in lines], [(line.upper - line.median) * 1e3 for line in lines]]
    at = [tick + (index - (count - 1) / 2) * width for tick in ticks]
    panel.bar(at, [line.median * 1e3 for line in lines], width, yerr=whiskers, label=lines[0].provider)


def _tick(width: int, height: int, rows: int) -> str:
    return f"{width}x{height}\n{rows} rows" if width else f"{rows} rows"


def _sections(lines: Sequence[TimedLine]) -> Iterator[list[TimedLine]]:
    """The lines of each part, sorted by size and rows, so that providers are adjacent."""
    for component in dict.fromkeys(line.component for line in lines):
        own = [line for line in lines if line.component == component]
        yield sorted(own, key=lambda line: (line.width * line.height, line.rows))


def _key(case: "TimedCase") -> tuple[str, tuple[int, int], int]:
    return case.component, case.size, case.rows


def _ratio(reference: Sequence[float], own: Sequence[float]) -> float:
    """The median ratio of times of the same round, which are equally disturbed. An interrupted run has one more of one of
    them."""
    return statistics.median(theirs / ours for theirs, ours in zip(reference, own, strict=False))


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"

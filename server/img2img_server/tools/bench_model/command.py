"""`img2img bench-model BUNDLE`: what the parts of a bundle and a whole step take on this machine, by provider, size and rows."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from img2img_server.runtime.execution import PROVIDERS, Execution
from img2img_server.settings.setting import build, settings_of
from img2img_server.settings.sources import declare, given

if TYPE_CHECKING:
    from img2img_server.bundle.manifest import Manifest
    from img2img_server.engine.request import Pipeline
    from img2img_server.tools.bench_model.measuring import TimedCase

_LEAST_ROUNDS = 3
_EXECUTION = tuple(one for one in settings_of(Execution) if one.name in ("threads", "arithmetic", "buckets", "cuda_graphs"))
"""Settings that are flags here as they are of `img2img serve`."""

_EPILOG = """\
examples:
  img2img bench-model models/my-model
  img2img bench-model models/my-model --providers cpu,openvino --sizes 256,512 --rows 1,2,4 --seconds 120
  img2img bench-model models/my-model --json bench.json --plot bench.png

Every provider is opened as `img2img serve` opens it, all of them at once: each takes its own memory. Then all variants take
turns until the time is over, three rounds at least, so that whatever else the machine does disturbs all alike. Ctrl-C prints
what was measured so far.

A row is one sample of a batch: a guided picture brings two. "step" is one of a request's steps, scheduler included. "share" is
the rate of the part's matrix products and convolutions over that of a large matrix product, measured in the same rounds on the
same threads (torch; fp32 on a CPU, or bf16 where it has AMX and the provider uses it; on a GPU what the part is in).
Exit status: 0 measured, 1 it could not be, 2 wrong arguments, 130 cut short by Ctrl-C.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", type=Path, help="the directory of a bundle")
    add(
        "--providers",
        type=_providers,
        default=(),
        metavar="P,...",
        help=f"what runs it, of {', '.join(PROVIDERS)} (default: all that are there)",
    )
    add("--sizes", type=_sizes, default=(), metavar="N,WxH,...", help="pictures' sizes in pixels (default: the model's own)")
    add("--rows", type=_rows, default=(1, 2), metavar="N,...", help="rows of a call (default: 1,2)")
    add("--seconds", type=float, default=30.0, metavar="N", help="how long to measure, beside loading (default: %(default)s)")
    declare(parser, _EXECUTION)
    add("--no-operations", action="store_true", help="do not count operations: no shares, and quicker to begin")
    add("--json", type=Path, metavar="FILE", help="write all that was measured here")
    add("--plot", type=Path, metavar="FILE", help="draw it here, as .png or .svg (needs matplotlib)")


def run(arguments: argparse.Namespace) -> int:
    """Measures and reports. Returns the exit status."""
    # Read at import by libraries that would report on their own imports, and by OpenMP, as `img2img serve` sets them.
    own = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for name, value in {**own, "OMP_WAIT_POLICY": "PASSIVE"}.items():
        os.environ.setdefault(name, value)
    from img2img_server.bundle.manifest import read_manifest
    from img2img_server.errors import BundleError
    from img2img_server.tools.bench_model import report as bench_report

    cut_short = False
    try:
        bench_report.check_plot(arguments.plot)
        manifest = read_manifest(arguments.bundle)
        pipelines = _open(arguments, manifest)
        cases = _cases(arguments, manifest, pipelines)
        cut_short = _measure(cases, arguments.seconds, tuple(pipelines))
    except (BundleError, OSError, ValueError) as error:
        print(f"img2img bench-model: {error}", file=sys.stderr)
        return 1
    report = bench_report.summarize(cases, str(arguments.bundle))
    bench_report.print_table(report)
    if arguments.json is not None:
        bench_report.write_json(report, arguments.json)
    if arguments.plot is not None:
        bench_report.draw(report, arguments.plot)
    return 130 if cut_short else 0


def _open(arguments: argparse.Namespace, manifest: "Manifest") -> "dict[str, Pipeline]":
    """The pipeline of each provider. One that was not asked for by name and isn't there is left out, with the reason."""
    from img2img_server.engine.cache import Cache
    from img2img_server.errors import BundleError
    from img2img_server.runtime.loader import load_pipeline

    pipelines: dict[str, Pipeline] = {}
    # TensorRT takes over from CUDA in a server, later: it is measured where it is asked for.
    for provider in arguments.providers or [name for name in PROVIDERS if name != "tensorrt"]:
        _tell(f"opening {arguments.bundle} on {provider}")
        execution = build(Execution, {**given(_EXECUTION, arguments), ("provider",): provider})
        try:
            pipelines[provider] = load_pipeline(arguments.bundle, manifest, execution, Cache(2**26))
        except BundleError as error:
            if arguments.providers:
                raise
            _tell(f"{provider} is left out: {error}")
    if not pipelines:
        raise BundleError(f"{arguments.bundle} runs on nothing that is here")
    return pipelines


def _cases(arguments: argparse.Namespace, manifest: "Manifest", pipelines: "dict[str, Pipeline]") -> "list[TimedCase]":
    """Everything to be measured, each run once. What a provider cannot do is left out, with the reason."""
    from img2img_server.errors import BundleError
    from img2img_server.tools.bench_model import variants

    first = next(iter(pipelines.values()))
    sizes = arguments.sizes or (first.native_size,)
    for size in sizes:
        if any(side % first.size_multiple for side in size):
            raise ValueError(f"{size[0]} x {size[1]}: this model's sizes are multiples of {first.size_multiple}")
    threads = arguments.threads or len(os.sched_getaffinity(0))
    asked = variants.Selection(arguments.bundle, manifest, sizes, arguments.rows, threads, arguments.arithmetic == "fp32")
    cases = [case for provider, pipeline in pipelines.items() for case in variants.cases_of(provider, pipeline, asked, _tell)]
    if not cases:
        raise BundleError("nothing could be measured")
    if not arguments.no_operations:
        _tell("counting operations")
        variants.count(cases, asked, _tell)
    return cases + variants.peaks_of(cases, threads)


def _measure(cases: "list[TimedCase]", seconds: float, providers: Sequence[str]) -> bool:
    """Rounds over all cases for so many seconds. Returns whether a person cut it short."""
    from img2img_server.tools.bench_model.measuring import synchronizer, take_turns

    begun = time.monotonic()
    try:
        for number, _ in enumerate(take_turns(cases, synchronizer(providers), time.perf_counter), start=1):
            passed = time.monotonic() - begun
            _tell(f"round {number}, {passed:.0f} of {seconds:.0f} s", again=True)
            if number >= _LEAST_ROUNDS and passed >= seconds:
                break
    except KeyboardInterrupt:
        return True
    finally:
        if sys.stderr.isatty():
            print(file=sys.stderr)
        for case in cases:
            case.work.close()
    return False


def _tell(text: str, again: bool = False) -> None:
    """Says on stderr how it goes. What comes `again` and again keeps its line, and is told to a person only."""
    if not again:
        print(text, file=sys.stderr)
    elif sys.stderr.isatty():
        print(f"\r{text} ", end="", file=sys.stderr, flush=True)


def _providers(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in PROVIDERS:
            raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(PROVIDERS)}")
    return names


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    return tuple(dict.fromkeys(_size(word) for word in text.split(",")))


def _size(word: str) -> tuple[int, int]:
    width, times, height = word.partition("x")
    numbers = (width, height if times else width)
    if not all(number.isascii() and number.isdigit() and int(number) > 0 for number in numbers):
        raise argparse.ArgumentTypeError(f"'{word}' is no size, such as 512 or 768x512")
    return int(numbers[0]), int(numbers[1])


def _rows(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"'{text}' are no numbers of rows, such as 1,2,4")
    return tuple(dict.fromkeys(map(int, words)))

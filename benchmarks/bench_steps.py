"""What `scripts/bench loras` and `image-prompts` share: variants of a step, measured in turns in one process."""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

BUNDLE = Path(__file__).resolve().parent.parent / ".demo" / "models" / "demo"


def configure(parser: argparse.ArgumentParser, bundle: str) -> None:
    """Adds the flags of a sub-command for a kind of `bundle`, such as "a bundle with LoRA graphs"."""
    parser.add_argument("--bundle", type=Path, default=BUNDLE, metavar="DIR", help=f"{bundle} (default: the demo model's)")
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="rows of a call (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="calls of each variant (default: %(default)s)")


def measure(variants: Mapping[str, Callable[[], Any]], arguments: argparse.Namespace) -> None:
    """Calls all variants in turns, and prints a table: medians and minima in milliseconds, and the median ratio of a round to the
    first variant."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(arguments.rounds + 1):
        for name, call in variants.items():
            gc.disable()
            begun = time.perf_counter()
            call()
            seconds = time.perf_counter() - begun
            gc.enable()
            if number:  # the first call opens graphs, fills slots and allocates
                times[name].append(seconds * 1e3)
    base = next(iter(times.values()))
    table = Table("variant", "median", "minimum", "to none", title=f"milliseconds of a step of {arguments.rows} rows")
    for name, measured in times.items():
        ratio = statistics.median(one / other for one, other in zip(measured, base, strict=True))
        table.add_row(name, f"{statistics.median(measured):.1f}", f"{min(measured):.1f}", f"{ratio:.2f}")
    Console(width=120).print(table)

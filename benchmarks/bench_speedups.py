"""Speedups: whole requests with each speedup of a bundle against exact ones, in turns in this process.

Counts of rows and the work that is left, by floating-point operations, come first. Then the medians of time per request, and the
PSNR of the image against the exact one.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT / ".demo" / "models" / "demo"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    parser.add_argument(
        "--bundle", type=Path, default=BUNDLE, metavar="DIR", help="a bundle exported with --speedups (default: the demo model's)"
    )
    parser.add_argument("--image", type=Path, default=ROOT / "demo" / "images" / "noon-lake.png", help="the source")
    parser.add_argument("--steps", type=int, default=25, metavar="N", help="inference steps (default: %(default)s)")
    parser.add_argument("--strength", type=float, default=0.8, metavar="S", help="strength (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="requests of each variant (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Measures the variants and prints a table."""
    from img2img_server.bundle.manifest import read_manifest
    from img2img_server.engine.request import Request, run_alone
    from img2img_server.runtime.accuracy_check import psnr_db
    from img2img_server.runtime.execution import Execution
    from img2img_server.runtime.loader import load_pipeline
    from img2img_server.support.fidelity import EXACT, Fidelity
    from PIL import Image

    manifest = read_manifest(arguments.bundle)
    known = manifest.speedups
    if not known.table:
        print(f"{arguments.bundle} has no speedups: export it with --speedups")
        return 1
    pipeline: Any = load_pipeline(arguments.bundle, manifest, Execution("cpu"))
    with Image.open(arguments.image) as image:
        source = image.convert("RGB").resize(pipeline.native_size)
    request = Request("m", source, "a lake at sunset", None, arguments.strength, arguments.steps, known.most_guidance, (3,))
    variants: dict[str, tuple[Any, Any]] = {"exact": (known, replace(request, fidelity=EXACT))}
    for one in known.table:
        variants[one.name] = replace(known, table=(one,)), replace(request, fidelity=Fidelity(None, min_psnr_db=0.0))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    images, plans = {}, {}
    for _ in range(arguments.rounds):
        for name, (speedups, asked) in variants.items():
            pipeline.speedups.speedups = speedups
            plans[name] = pipeline.plan(asked)
            begun = time.perf_counter()
            (images[name],) = run_alone(pipeline, asked)
            seconds[name].append(time.perf_counter() - begun)
    columns = ("speedup", "rows: whole", "light", "less work", "seconds", "faster", "PSNR", "worst reference")
    table = Table(*columns, title=f"{arguments.steps} steps at strength {arguments.strength:g}, guidance {known.most_guidance:g}")
    for name, (speedups, _) in variants.items():
        whole, light = _rows(plans[name])
        less = plans[name].speedup.times_faster if plans[name].speedup else 1.0
        faster = statistics.median(one / other for one, other in zip(seconds["exact"], seconds[name], strict=True))
        worst = "" if name == "exact" else f"{speedups.table[0].psnr_db:.1f} dB"
        cells: Sequence[str] = (
            name, str(whole), str(light), f"{less:.2f} x", f"{statistics.median(seconds[name]):.3f}", f"{faster:.2f} x",
            f"{psnr_db(images[name], images['exact']):.1f} dB", worst,
        )  # fmt: skip
        table.add_row(*cells)
    Console(width=150).print(table)
    return 0


def _rows(plan: Any) -> tuple[int, int]:
    """The rows of all calls of the whole and of the light graph."""
    calls = plan.calls or [plan] * plan.step_count
    whole = sum(call.rows for call in calls if call.shape == plan.shape)
    return whole, sum(call.rows for call in calls) - whole

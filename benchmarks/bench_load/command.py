"""Compares the server with peers under load: throughput, latencies, fairness, batch sizes."""

import argparse
import asyncio
from collections.abc import Callable, Collection

from rich.console import Console

from bench_load.families import FAMILIES
from bench_load.measuring import Measurement, Settings, record_trace
from bench_load.servers import FIRST_SERVERS, ROOT, SERVERS, ServerFailed, knows_trace
from bench_load.workloads import WORKLOADS

FOLDER = ROOT / ".bench"

_EPILOG = """\
examples:
  scripts/bench load                                     all workloads and servers: about 15 minutes
  scripts/bench load --workloads saturation --rounds 1   one workload, once
  scripts/bench load --servers ours,lock --seconds 4     two servers, short
  scripts/bench load --servers ours,litserve,bentoml --workloads uniform,crowd,alone   after scripts/peers_setup

servers:
{servers}

workloads (each a list of jobs, determined by the seed and the same for every server):
{workloads}

writes .bench/load.json (every request's record), .bench/load.png (plots) and the servers' logs in .bench/logs.
Run it on an idle machine. Servers take turns; the others are stopped (SIGSTOP) and use only memory.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `scripts/bench load`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG.format(
        servers="\n".join(f"  {name:<12}{what}" for name, what in SERVERS.items()),
        workloads="\n".join(f"  {name:<12}{workload.title}" for name, workload in WORKLOADS.items()),
    )
    add = parser.add_argument
    add(
        "--servers",
        type=_names(SERVERS),
        default=FIRST_SERVERS,
        metavar="A,B",
        help="servers to compare (default: the first four)",
    )
    add("--workloads", type=_names(WORKLOADS), default=tuple(WORKLOADS), metavar="A,B", help="workloads to run (default: all)")
    length = "length of a list, as approximate seconds for peer lock (default: %(default)s)"
    add("--seconds", type=_seconds, default=8.0, metavar="S", help=length)
    add("--rounds", type=_count, default=2, metavar="N", help="rounds over all servers (default: %(default)s)")
    add(
        "--family",
        choices=FAMILIES,
        help="serve a model of this family, with random weights, instead of the demo's; lock and batching then run "
        "diffusers on PyTorch",
    )
    add("--seed", type=int, default=1, metavar="N", help="seed of the lists (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Measures and reports. Returns 0, or 1 if a server did not start."""
    from bench_load.plots import draw
    from bench_load.report import print_tables, write

    console = Console(stderr=True, highlight=False, markup=False)
    logs = FOLDER / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    family = FAMILIES.get(arguments.family)
    chosen = tuple(name for name in arguments.servers if family is None or name in family.servers)
    if left_out := [name for name in arguments.servers if name not in chosen]:
        console.print(f"[bench] {arguments.family} cannot run on: {', '.join(left_out)}")
    settings = Settings(chosen, arguments.workloads, arguments.seconds, arguments.rounds, arguments.seed, logs, family)
    try:
        results = asyncio.run(Measurement(settings, console).run())
        if "ours" in settings.servers and "saturation" in settings.workloads and knows_trace():
            results.trace = asyncio.run(record_trace(settings, results.speed, console))
    except ServerFailed as error:
        console.print(f"[bench] {error}")
        return 1
    print_tables(results, settings, Console(width=max(Console().width, 150), highlight=False))
    write(FOLDER / "load.json", results, settings)
    draw(FOLDER / "load.png", results, settings)
    console.print("[bench] written to .bench/load.json and .bench/load.png")
    return 0


def _names(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return names

    return parse


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 3600:
        raise argparse.ArgumentTypeError("must be more than 0 and less than an hour")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value

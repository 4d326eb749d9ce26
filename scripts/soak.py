"""The Python half of `scripts/soak`, which see."""

import argparse
import asyncio
import os
import random
import shutil
import socket
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

from soak_parts import report
from soak_parts.driving import Driver, Load, drain, measure_capacity
from soak_parts.judging import growth_of, judge
from soak_parts.ledger import Ledger
from soak_parts.pictures import subjects
from soak_parts.process import ROOT, SERVE, STAND_IN, ServerFailed, ServingProcess
from soak_parts.stand_in import plant
from soak_parts.traffic import Traffic
from soak_parts.watching import Watch

_EPILOG = """\
examples:
  scripts/soak --minutes 60                    an hour at twice what the server can do, on the demo's model
  scripts/soak --minutes 60 --seed 7           the same operations at the same moments once more, as far as timing allows
  scripts/soak --model fake --minutes 1        the whole machinery in a minute, on a server without a model
  scripts/soak --bundle models/sdxl            another model

The server is a process of its own, started and ended by the soak. First its capacity is measured: pictures a second of 32
callers; later again, as machines change. Then operations come at random moments, on average --capacity-factor times as many as
it can do: plain requests, streams, assets, a second model that is loaded and unloaded; callers that cancel, that set short
deadlines, that read slowly, whose connection is reset or whose process is killed; pictures that are none, fields that are wrong.
Health is asked all along.

Every so often nobody asks for a moment, and the server has to come to rest: nothing waiting, nothing active, no call open.

exit status: 0 every promise was kept, 1 one was not (they are listed), 2 wrong arguments or no server
what is left: .soak/soak.json, .soak/soak.md (a table) and .soak/server.log; --out names another folder
"""
_FLAGS = ("--warm-up=3", "--max-waiting=48", "--cache-bytes=4MiB", "--assets-quota=128MiB", "--watchdog=120", "--grace=100")
_CAPACITY_SHARE, _CAPACITY_MOST = 0.1, 20.0
_MAIN, _SECOND = "main", "second"


def main() -> int:
    """Runs the soak. Returns the exit status."""
    arguments = _parse()
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("server.log", "soak.json", "soak.md"):
        (folder / name).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="img2img-soak-") as scratch:
        try:
            return asyncio.run(_soak(arguments, Path(scratch)))
        except ServerFailed as error:
            print(f"soak: {error}", file=sys.stderr)
            return 2


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/soak",
        description="Has a server do twice what it can, among all that goes wrong in life, and looks at every answer.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=60.0, metavar="N", help="how long, under load (default: %(default)g)")
    add("--seed", type=int, default=0, metavar="N", help="of all that is drawn at random (default: %(default)s)")
    add("--capacity-factor", type=float, default=2.0, metavar="X", help="times the capacity to ask for (default: %(default)g)")
    add("--model", choices=("demo", "fake"), default="demo", help="fake: a server that loads no model (default: %(default)s)")
    add("--bundle", type=Path, metavar="DIR", help="serve this bundle (default: the demo's, exported first)")
    add("--out", type=Path, default=ROOT / ".soak", metavar="DIR", help="where figures and log go (default: .soak)")
    arguments = parser.parse_args()
    if arguments.minutes <= 0 or arguments.capacity_factor <= 0:
        parser.error("--minutes and --capacity-factor are more than 0")
    return arguments


async def _soak(arguments: argparse.Namespace, scratch: Path) -> int:
    seconds, metrics_port = 60 * arguments.minutes, _free_port()
    server = _server(arguments, scratch, metrics_port)
    ledger, dice = Ledger(), random.Random(arguments.seed)
    drawn = subjects(12, arguments.seed)
    try:
        await asyncio.to_thread(server.start)
        _say(f"serving on {server.target}, process {server.pid}, log in {server.log}")
        traffic = Traffic(server.port, drawn, _SECOND, assets=True, ledger=ledger, dice=dice)
        await traffic.draw_references()
        capacity = await measure_capacity(traffic, min(_CAPACITY_MOST, max(2.0, _CAPACITY_SHARE * seconds)))
        load = Load(seconds, capacity, arguments.capacity_factor)
        _say(f"capacity: {capacity:.2f} pictures a second; sending {load.rate:.2f} operations a second for {seconds:.0f} s")
        watch = Watch(server, metrics_port, ledger)
        health = asyncio.create_task(watch.health())
        driver = Driver(traffic, watch, load, dice, _say)
        await driver.run()
        health.cancel()
        loaded = time.monotonic() - watch.begun
        status, stop_seconds = await drain(server, traffic)
        await traffic.close()
    finally:
        server.kill()
    growth = growth_of(watch, loaded)
    broken = judge(ledger, watch, growth, server.read_log(), loaded)
    model = "stand-in" if arguments.model == "fake" else str(arguments.bundle or "demo")
    capacity = median(driver.capacities)
    rate = Load(loaded, capacity, arguments.capacity_factor).rate
    run = report.Run(arguments.seed, model, loaded, capacity, rate, stop_seconds, status)
    print(report.write(arguments.out, run, ledger, watch, growth, broken))
    for line in broken:
        print(f"BROKEN: {line}")
    return 1 if broken else 0


def _server(arguments: argparse.Namespace, scratch: Path, metrics_port: int) -> ServingProcess:
    """Not yet started: over a store of the bundle, twice, so that there is a second model to load and unload."""
    store = scratch / "models"
    store.mkdir()
    for name in (_MAIN, _SECOND):
        if arguments.model == "fake":
            plant(store, name)
        else:
            shutil.copytree(arguments.bundle or ROOT / ".demo" / "models" / "demo", store / name)
    command = STAND_IN if arguments.model == "fake" else SERVE
    flags = ["--models", str(store), "--default-model", _MAIN, "--assets", str(scratch / "assets")]
    flags += ["--metrics-port", str(metrics_port), *_FLAGS]
    return ServingProcess(arguments.out, [*command, *flags], {"OMP_WAIT_POLICY": "PASSIVE"})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _say(what: str) -> None:
    print(f"[soak] {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # the driver's own channels are reset on purpose
    sys.exit(main())

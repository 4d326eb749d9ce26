"""`scripts/soak`: a fault-injection load test of a whole server."""

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import socket
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from soak_parts.access import Access, issue
from soak_parts.attacks import held_calls
from soak_parts.driving import Driver, Load, drain, measure_capacity
from soak_parts.images import subjects
from soak_parts.judging import Times, growth_of, judge, judge_times
from soak_parts.ledger import Ledger
from soak_parts.process import ROOT, SERVE, STAND_IN, ServerFailed, ServingProcess
from soak_parts.report import Report, Run
from soak_parts.stand_in import STEP_SECONDS, plant
from soak_parts.strangers import Strangers, strangers
from soak_parts.traffic import Traffic
from soak_parts.watching import Watch

_EPILOG = """\
examples:
  scripts/soak --minutes 60                    an hour at twice the server's capacity, with the demo model
  scripts/soak --minutes 60 --seed 7           repeat the same operations at the same times, as far as timing allows
  scripts/soak --model fake --minutes 1        a short run with a fake model
  scripts/soak --bundle models/sdxl            another model
  scripts/soak --engine ray --kserve           models run as replicas on Ray, and KServe v2 is part of the mix

The soak starts the server in its own process and stops it. It first measures the capacity (images per second of 32 callers; the
machine should be idle), and repeats that between the intervals of load. Then operations arrive at random times, on average
--capacity-factor times the capacity: plain requests, streams, assets, a second model that is loaded and unloaded; callers that
cancel, set short deadlines or read slowly, whose connection is reset or whose process is killed; invalid images and fields.
Health is checked throughout. A small tenant sends one request after another, first alone and then under load.

A process of hostile clients stays connected until the end: readers and watchers whose flow-control window is 0, stalled uploads,
unread answers, JPEG scan bombs, marker and comment bombs, gzip messages, bombs of packed fields, stream resets.

At intervals the load pauses, and the server must become idle: no waiting or active request, no open call.

exit status: 0 every guarantee held, 1 one was violated (they are listed), 2 invalid arguments or the server did not start
output: .soak/soak.json, .soak/soak.md (a table) and .soak/server.log; --out sets another folder
"""
_GRACE = 60
_ALONE = 40
"""Requests of the small tenant before the load begins."""
_FLAGS = ("--warm-up=3", "--max-waiting=48", "--cache-bytes=4MiB", "--assets-quota=128MiB", "--watchdog=120", f"--grace={_GRACE}")
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
        description="Loads a server beyond its capacity, injects faults, and checks every answer.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=60.0, metavar="N", help="minutes of load (default: %(default)g)")
    add("--seed", type=int, default=0, metavar="N", help="seed of all random choices (default: %(default)s)")
    add(
        "--capacity-factor",
        type=float,
        default=2.0,
        metavar="X",
        help="load in multiples of capacity (default: %(default)g)",
    )
    add("--model", choices=("demo", "fake"), default="demo", help="fake: a server with a fake model (default: %(default)s)")
    add(
        "--fake-step",
        type=float,
        default=0.01,
        metavar="SECONDS",
        help="duration of the fake's step (default: %(default)g)",
    )
    add("--bundle", type=Path, metavar="DIR", help="serve this bundle (default: the demo model, exported first)")
    add("--out", type=Path, default=ROOT / ".soak", metavar="DIR", help="folder of the report and the log (default: .soak)")
    switch = argparse.BooleanOptionalAction
    add("--tls", action=switch, default=True, help="TLS, with a new certificate authority (default: on)")
    add("--tokens", action=switch, default=True, help="a token for each tenant (default: on)")
    add("--hostile", action=switch, default=True, help="hostile clients of all kinds (default: on)")
    add("--kserve", action=switch, default=False, help="include KServe v2 calls (default: off)")
    add("--engine", choices=("local", "ray"), default="local", help="where models run, as for img2img serve (default: local)")
    arguments = parser.parse_args()
    if arguments.hostile and not arguments.tokens:
        parser.error("--no-tokens needs --no-hostile: without tokens the hostile clients and the others count as one client")
    if arguments.engine == "ray" and arguments.model == "fake":
        parser.error("--engine ray needs a real model: replicas on Ray cannot load the fake one")
    if min(arguments.minutes, arguments.capacity_factor, arguments.fake_step) <= 0:
        parser.error("--minutes, --capacity-factor and --fake-step must be more than 0")
    return arguments


async def _soak(arguments: argparse.Namespace, scratch: Path) -> int:
    seconds, metrics_port = 60 * arguments.minutes, _free_port()
    access, flags = issue(scratch, arguments.tls, arguments.tokens)
    server = _server(arguments, scratch, [*flags, "--metrics-port", str(metrics_port)])
    ledger, dice = Ledger(), random.Random(arguments.seed)
    requests = subjects(12, arguments.seed)
    attacks: dict[str, dict[str, int]] = {}
    try:
        await asyncio.to_thread(server.start)
        _say(f"serving on {server.target}, process {server.pid}, log in {server.log}")
        traffic = Traffic(server.port, access, requests, (_MAIN, _SECOND), arguments.kserve, ledger, dice)
        await traffic.make_references()
        alone = await traffic.small_alone(min(_ALONE, max(2, round(_CAPACITY_SHARE * seconds))))
        capacity = await measure_capacity(traffic, min(_CAPACITY_MOST, max(2.0, _CAPACITY_SHARE * seconds)))
        load = Load(seconds, capacity, arguments.capacity_factor)
        _say(f"capacity: {capacity:.2f} images per second; sending {load.rate:.2f} operations per second for {seconds:.0f} s")
        async with contextlib.AsyncExitStack() as stack:
            hostile = await _hostile(arguments, stack, server, access, traffic)
            watch = Watch(server, metrics_port, ledger, access, held_calls(arguments.kserve) if hostile else Counter())
            health = asyncio.create_task(watch.health())
            driver = Driver(traffic, watch, hostile, load, dice, _say)
            await driver.run()
            health.cancel()
            loaded = time.monotonic() - watch.begun
            status, stop_seconds = await drain(server, access, traffic)
            if hostile:
                await hostile.end(ledger)
                attacks = hostile.statuses
        await traffic.close()
    finally:
        server.kill()
    growth = growth_of(watch, loaded)
    times = Times(alone, traffic.small_seconds, stop_seconds, _GRACE)
    broken = judge(ledger, watch, growth, server.read_log(), loaded) + judge_times(times, watch.health_seconds)
    model = "fake" if arguments.model == "fake" else str(arguments.bundle or "demo")
    capacity = median(driver.capacities)
    rate = Load(loaded, capacity, arguments.capacity_factor).rate
    names = [name for name in ("tls", "tokens", "hostile", "kserve") if getattr(arguments, name)]
    run = Run(arguments.seed, model, loaded, capacity, rate, status, " ".join([arguments.engine, *names]))
    print(Report(run, ledger, watch, growth, times, attacks, broken).write(arguments.out))
    for line in broken:
        print(f"VIOLATED: {line}")
    return 1 if broken else 0


async def _hostile(
    arguments: argparse.Namespace, stack: contextlib.AsyncExitStack, server: ServingProcess, access: Access, traffic: Traffic
) -> Strangers | None:
    if not arguments.hostile:
        return None
    asset = await traffic.upload()
    made = await stack.enter_async_context(strangers(server.target, access, asset, arguments.kserve, arguments.seed))
    _say("hostile clients are connected")
    return made


def _server(arguments: argparse.Namespace, scratch: Path, more: Sequence[str]) -> ServingProcess:
    """The server, not started. Its models folder has the bundle twice, so that there is a second model to load and unload."""
    store = scratch / "models"
    store.mkdir()
    for name in (_MAIN, _SECOND):
        if arguments.model == "fake":
            plant(store, name)
        else:
            shutil.copytree(arguments.bundle or ROOT / ".demo" / "models" / "demo", store / name)
    command = STAND_IN if arguments.model == "fake" else SERVE
    flags = ["--models", str(store), "--default-model", _MAIN, "--assets", str(scratch / "assets")]
    flags += ["--engine", arguments.engine, *(["--kserve"] if arguments.kserve else []), *more, *_FLAGS]
    environment = {"OMP_WAIT_POLICY": "PASSIVE", STEP_SECONDS: str(arguments.fake_step)}
    return ServingProcess(arguments.out, [*command, *flags], environment)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _say(what: str) -> None:
    print(f"[soak] {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # the driver resets its channels on purpose; the server uses gRPC's default
    sys.exit(main())

"""Compares engines on Ray with one in the server's process, on a simulated device that only sleeps.

Needs no model and no GPU. Requests are 128 x 128 pixels, PNG, one step.
"""

import argparse
import asyncio
import concurrent.futures
import contextlib
import functools
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from bench_load.figures import percentile
from img2img_client import Client
from PIL import Image
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / ".bench" / "ray.json"
_SERVER = ROOT / "benchmarks" / "simulated_server.py"
_MARK = "IMG2IMG_BENCH_RAY"
"""An environment variable of all processes of this run."""
_ADDED = {"seconds": 0.001}
_TWO = {"min_replicas": 2, "num_cpus": 0}
_WARM = 20
"""Number of warm-up requests."""
_SHARED = {"seconds": 0.05, "more": 0.05}
"""The device for throughput: batches gain nothing, so one device runs 20 one-step requests per second."""

_console = Console(stderr=True, highlight=False, markup=False)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    parser.add_argument("--requests", type=int, default=300, metavar="N", help="sequential requests (default: %(default)s)")
    parser.add_argument(
        "--replicas", default="1,2,4", metavar="N[,...]", help="numbers of replicas for throughput (default: %(default)s)"
    )
    parser.add_argument(
        "--clients", type=int, default=24, metavar="N", help="concurrent clients for throughput (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=10.0, metavar="N", help="seconds of each throughput measurement (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs everything on one cluster, prints tables and writes a JSON file."""
    counts = [int(count) for count in arguments.replicas.split(",")]
    figures: dict[str, float] = {}
    with _server({"engine": "ray"}, _TWO, _ADDED) as front:
        figures["start with a cluster and two replicas, s"] = front.seconds
        figures |= _added(front, arguments.requests)
        with _server({"engine": "local"}, {}, _SHARED) as local:
            figures["in the process, requests/s"] = _throughput(local, arguments)
        for count in counts:
            ray = {"address": front.address, "app": f"bench-{count}", "min_replicas": count, "num_cpus": 0}
            with _server({"engine": "ray"}, ray, _SHARED) as server:
                figures[f"{count} on Ray, requests/s"] = _throughput(server, arguments)
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:.2f}")
    Console(width=110).print(table)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


@dataclass(frozen=True, slots=True)
class _Served:
    """A running server."""

    target: str
    seconds: float
    """Seconds from the start of the process until it served."""
    address: str
    """Address of its Ray cluster, if any."""


@contextlib.contextmanager
def _server(settings: Mapping[str, Any], ray: Mapping[str, Any], device: Mapping[str, Any]) -> Iterator[_Served]:
    environment = {**os.environ, **_access(), "PYTHONPATH": str(ROOT / "benchmarks"), _MARK: str(os.getpid())}
    with tempfile.TemporaryDirectory() as folder:
        port_file, log = Path(folder) / "port", Path(folder) / "log"
        words = [{"port_file": str(port_file), **settings}, dict(ray), dict(device)]
        begun = time.perf_counter()
        with log.open("wb") as errors:
            command = [sys.executable, str(_SERVER), *map(json.dumps, words)]
            process = subprocess.Popen(command, stderr=errors, env=environment)
        try:
            while not port_file.exists():
                if process.poll() is not None:
                    raise SystemExit(f"bench: the server did not start\n{log.read_text()}")
                time.sleep(0.01)
            lines = [line for line in log.read_text().splitlines() if "Ray cluster at " in line]
            address = lines[0].split("Ray cluster at ")[1].split(";")[0] if lines else ""
            yield _Served(f"127.0.0.1:{port_file.read_text().strip()}", time.perf_counter() - begun, address)
        finally:
            process.terminate()
            process.wait(60)


def _source() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((128, 128), 50).convert("RGB").save(out, "PNG")
    return out.getvalue()


def _ask(client: Client, data: bytes, seed: int) -> None:
    client.transform(data, prompt="", seed=seed, num_inference_steps=1, strength=1.0)


def _added(front: _Served, count: int) -> dict[str, float]:
    """Milliseconds of the same request in the process and on Ray, in turns; start times and memory of processes."""
    data = _source()
    with contextlib.ExitStack() as stack:
        local = stack.enter_context(_server({"engine": "local"}, {}, _ADDED))
        second = stack.enter_context(_server({"engine": "ray"}, {**_TWO, "address": front.address}, _ADDED))
        _console.print("[bench] sequential requests, in turns")
        clients = {
            "in the process": stack.enter_context(Client(local.target, timeout=60)),
            "on Ray": stack.enter_context(Client(front.target, timeout=60)),
        }
        times: dict[str, list[float]] = {name: [] for name in clients}
        for number in range(_WARM + count):
            for name in list(clients)[:: 1 if number % 2 else -1]:
                begun = time.perf_counter()
                _ask(clients[name], data, number)
                times[name].append((time.perf_counter() - begun) * 1e3)
        memory = _memory()
    pairs = zip(times["on Ray"], times["in the process"], strict=True)
    times["added by Ray, round by round"] = [one - other for one, other in pairs]
    times["a replica's call alone, by a handle"] = _calls(front.address, data, count)
    figures: dict[str, float] = {}
    for name, values in times.items():
        measured = values[_WARM:]
        figures |= {f"{name}, ms, median": statistics.median(measured), f"{name}, ms, p95": percentile(measured, 95)}
    starts = {"start in the process, s": local.seconds, "start of a second front, s": second.seconds}
    return {**figures, **starts, **memory}


def _calls(address: str, data: bytes, count: int) -> list[float]:
    """Milliseconds of the same request from this process directly to a replica."""
    os.environ.update(_access())
    from img2img_server.backends.ray.backend import RayConnection
    from img2img_server.backends.ray.messages import RemoteRequest
    from img2img_server.config import RaySettings, ServerConfig
    from img2img_server.engine.request import Request
    from simulated_device import SOMEWHERE, simulated

    config = ServerConfig(SOMEWHERE, engine="ray", warm_up=0.0, ray=RaySettings(address=address, min_replicas=2, num_cpus=0))
    image = Image.open(io.BytesIO(data)).convert("RGB")

    async def measure() -> list[float]:
        connection = RayConnection(config, functools.partial(simulated, seconds=_ADDED["seconds"]))
        replicas, times = await connection.open(), []
        for seed in range(_WARM + count):
            begun = time.perf_counter()
            await replicas.transform(RemoteRequest.of(Request("m", image, "", None, 1.0, 1, 7.5, (seed,)), 0.0))
            times.append((time.perf_counter() - begun) * 1e3)
        await connection.close()
        return times

    return asyncio.run(measure())


def _access() -> dict[str, str]:
    """Environment variables to access this run's cluster."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64, "RAY_USAGE_STATS_ENABLED": "0"}


def _memory() -> dict[str, float]:
    """Private memory (USS) in MiB of each process of this run, by its role."""
    found: dict[str, float] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(_MARK) == str(os.getpid()):
                title = " ".join(process.cmdline())
                found[f"memory of {_what(title)} ({process.pid}), MiB"] = process.memory_full_info().uss / 2**20
    return dict(sorted(found.items()))


def _what(title: str) -> str:
    """The role of a process, by its command line."""
    names = {
        str(_SERVER): "the server in the process" if '"local"' in title else "a front",
        "ServeReplica": "a replica",
        "ray::ServeController": "Ray: controller",
        "gcs_server": "Ray: gcs",
        "raylet/raylet": "Ray: raylet",
        "ray::IDLE": "Ray: idle worker",
        "default_worker.py": "Ray: idle worker",
        "dashboard": "Ray: agents",
        "runtime_env": "Ray: agents",
        "ray/autoscaler": "Ray: monitor",
        "log_monitor": "Ray: log monitor",
    }
    return next((name for part, name in names.items() if part in title), title[:40])


def _throughput(served: _Served, arguments: argparse.Namespace) -> float:
    """Requests per second of clients in a closed loop."""
    _console.print("[bench] concurrent requests")
    data, seeds = _source(), itertools.count()
    with Client(served.target, timeout=60) as client, concurrent.futures.ThreadPoolExecutor(arguments.clients) as pool:
        for _ in range(8):
            _ask(client, data, next(seeds))
        begun = time.perf_counter()

        def one_client() -> int:
            for done in itertools.count():
                if time.perf_counter() > begun + arguments.seconds:
                    return done
                _ask(client, data, next(seeds))
            raise AssertionError("unreachable")

        total = sum(future.result() for future in [pool.submit(one_client) for _ in range(arguments.clients)])
        return total / (time.perf_counter() - begun)

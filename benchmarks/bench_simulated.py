"""The scheduler on a simulated GPU: the real engine, compared with two peers on the same device.

No GPU is needed and nothing is computed: calls take the published times of an H200 on a manual clock. This measures the scheduler
alone, without the overhead of Python, codecs or gRPC: an upper bound, and the same numbers on every machine.
"""

import argparse
import itertools
import json
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench_load.figures import percentile
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Event, Plan, Request
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.engine.warmup import WarmUp
from manual_device import IMAGE, ManualDevice, ManualState
from PIL import Image
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / ".bench" / "simulated.json"

_GAINS = ((1, 1.0), (3, 2.7), (8, 3.2))
"""Images per second by images in a call, relative to one: 512 x 512 on an H200, as published (shared/facts.md)."""
_STEP = 0.0051
"""Seconds of a guided UNet call of one image: 2.5 times the lower bound of 2.03 ms, the target for this GPU."""
_ENCODE, _DECODE = 0.0014, 0.0032
"""Seconds to encode and decode a 512 x 512 image: the lower bounds."""
_MIX_STEPS = (4, 8, 12, 20, 25, 30, 50)
_TURN = 0.02
"""Seconds from a result to the next request of a client that always sends one: codecs and the network."""


def call_seconds(images: float) -> float:
    """Seconds of a UNet call of guided images: linear interpolation and extrapolation of the published points."""
    points = [(count, _STEP * count / gain) for count, gain in _GAINS]
    if images <= 1:
        return _STEP  # constant below; half an image is one without guidance
    for (left, low), (right, high) in itertools.pairwise(points):
        if images <= right or right == points[-1][0]:
            return low + (high - low) * (images - left) / (right - left)
    raise AssertionError("the last point ends the loop")


@dataclass(frozen=True, slots=True)
class Job:
    """A request: its arrival in seconds and its work. A peer batches requests with equal `settings`. `client` is its sender."""

    arrival: float
    steps: int
    guided: bool
    settings: tuple[object, ...]
    client: str = ""

    @property
    def alone(self) -> float:
        """Seconds alone on an idle device."""
        return _ENCODE + self.steps * call_seconds(self.images) + _DECODE

    @property
    def images(self) -> float:
        """Its size in a call, in guided images."""
        return 1.0 if self.guided else 0.5


def mixed_jobs(count: int, rate: float, seed: int) -> list[Job]:
    """Poisson arrivals of `rate` per second, 4 to 50 steps, strength 0.3 to 1, one in five without guidance."""
    source = random.Random(seed)
    now, jobs = 0.0, []
    for _ in range(count):
        now += source.expovariate(rate)
        steps, strength, guided = source.choice(_MIX_STEPS), source.uniform(0.3, 1.0), source.random() > 0.2
        jobs.append(Job(now, max(1, int(steps * strength)), guided, (steps, round(strength, 2), guided)))
    return jobs


def short_among_long(count: int) -> list[Job]:
    """A request of 50 steps every 100 ms, which exceeds the capacity of peer (a), and one of 4 steps every 50 ms."""
    long = [Job(0.1 * index, 50, True, (50,)) for index in range(count)]
    short = [Job(0.05 * index, 4, True, (4,)) for index in range(1, 2 * count)]
    return sorted(long + short, key=lambda job: job.arrival)


def few_among_a_flood(count: int) -> list[Job]:
    """One client sends requests of 20 steps at 1.2 times our server's capacity; another one of 50 steps every two seconds."""
    rate = 1.2 / (_ENCODE + 20 * call_seconds(8) / 8 + _DECODE)
    flood = [Job(index / rate, 20, True, (20,), "flood") for index in range(count)]
    few = [Job(2.0 * index, 50, True, (50,), "few") for index in range(1, int(count / rate / 2))]
    return sorted(flood + few, key=lambda job: job.arrival)


@dataclass(slots=True)
class Alike:
    """Clients that send requests of 20 steps, each the next one `_TURN` seconds after its last has ended, give or take a fifth.

    The first ones come within that time, too. `sent` has the times at which the requests that are due were sent."""

    clients: int
    count: int
    sent: list[float] = field(default_factory=list)
    last: float = 0.0
    _turns: random.Random = field(default_factory=lambda: random.Random(1))

    def __post_init__(self) -> None:
        self.sent = sorted(_TURN * self._turns.random() for _ in range(self.clients))

    def ended(self, now: float, requests: int = 1) -> None:
        """Records that requests ended: their clients send the next ones, until `count` were sent."""
        self.last = now
        self.sent = sorted([*self.sent, *(now + _TURN * self._turns.uniform(0.8, 1.2) for _ in range(requests))])

    def take(self, now: float, most: int) -> list[float]:
        """Removes requests that were sent until `now`, at most `most`, and returns when they were."""
        taken = [time for time in self.sent if time <= now][: min(most, self.count)]
        self.sent, self.count = self.sent[len(taken) :], self.count - len(taken)
        return taken


def lock_alike(load: Alike) -> float:
    """Peer (a) under alike requests. Returns when the last one ended, in seconds."""
    return batch_alike(load, 1)


def batch_alike(load: Alike, most: int = 8, delay: float = 0.01) -> float:
    """Peer (b) under alike requests: it waits for others until the first has waited for `delay`."""
    now = 0.0
    while load.count:
        first = load.sent[0]
        now = max(now, min(first + delay, load.sent[most - 1] if len(load.sent) >= most else math.inf), first)
        batch = load.take(now, most)
        now += 20 * call_seconds(len(batch)) + len(batch) * (_ENCODE + _DECODE)
        load.ended(now, len(batch))
    return load.last


def engine_alike(load: Alike) -> float:
    """Ours under alike requests."""
    device, engine = _measured_engine(QueueLimits())

    def listen(event: Event) -> None:
        if isinstance(event, Completed):
            load.ended(device.now)

    while True:
        for _ in load.take(device.now, load.count):
            engine.submit(Request("m", IMAGE, "", "", 1.0, 20, 7.5, (0,)), listen)
        if not engine.step():
            if not load.count:
                return load.last
            device.now = max(device.now, load.sent[0])


_ALIKE = {"ours": engine_alike, "lock": lock_alike, "batching": batch_alike}


def run_lock(jobs: Sequence[Job]) -> list[float]:
    """Peer (a): one request after the other. Returns the latency of each."""
    free, took = 0.0, []
    for job in jobs:
        free = max(free, job.arrival) + job.alone
        took.append(free - job.arrival)
    return took


def run_request_batches(jobs: Sequence[Job], most: int = 8) -> list[float]:
    """Peer (b): when the device is free, the oldest request and the waiting ones with equal settings run together to the end."""
    waiting, took = list(range(len(jobs))), [0.0] * len(jobs)
    free = 0.0
    while waiting:
        free = max(free, jobs[waiting[0]].arrival)
        first = jobs[waiting[0]]
        batch = [index for index in waiting if jobs[index].arrival <= free and jobs[index].settings == first.settings][:most]
        share = sum(jobs[index].images for index in batch)
        free += first.steps * call_seconds(share) + len(batch) * (_ENCODE + _DECODE)
        for index in batch:
            took[index] = free - jobs[index].arrival
            waiting.remove(index)
    return took


class _Device(ManualDevice):
    """Takes the times of the simulated GPU."""

    engine = "simulated:h200"

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def plan(self, request: Request) -> Plan:
        rows = 2 if request.guidance_scale > 1 else 1
        return Plan("512", 512 * 512, rows, request.num_inference_steps)

    def prepare(self, requests: Sequence[Request]) -> Sequence[ManualState]:
        self.now += _ENCODE * len(requests)
        return super().prepare(requests)

    def denoise(self, states: Sequence[ManualState]) -> Sequence[None]:
        self.batches.append(len(states))
        self.now += call_seconds(sum(state.rows / 2 for state in states))
        return [None] * len(states)

    def finish(self, states: Sequence[ManualState]) -> Sequence[Sequence[Image.Image]]:
        self.now += _DECODE * len(states)
        return super().finish(states)


def _measured_engine(limits: QueueLimits) -> tuple[_Device, Engine]:
    """An engine on the simulated device after the server's warm-up, at time 0."""
    device = _Device()
    engine = Engine({"m": device}, limits, device.clock)
    engine.costs.adopt("m", WarmUp(limits.max_batch_size, 10.0, device.clock).measure("m", device))
    device.now = 0.0
    return device, engine


def run_engine(jobs: Sequence[Job]) -> list[float]:
    """Ours: the engine, stepped by the simulation, with the server's warm-up."""
    device, engine = _measured_engine(QueueLimits(max_waiting=len(jobs), max_client_waiting=len(jobs)))
    took = [0.0] * len(jobs)

    def listener(index: int) -> Callable[[Event], None]:
        def listen(event: Event) -> None:
            if isinstance(event, Completed):
                took[index] = device.now - jobs[index].arrival

        return listen

    index = 0
    while True:
        while index < len(jobs) and jobs[index].arrival <= device.now:
            job = jobs[index]
            guidance = 7.5 if job.guided else 1.0
            engine.submit(Request("m", IMAGE, "", "", 1.0, job.steps, guidance, (0,), client=job.client), listener(index))
            index += 1
        if not engine.step():
            if index == len(jobs):
                return took
            device.now = max(device.now, jobs[index].arrival)


def _run_as_one_client(jobs: Sequence[Job]) -> list[float]:
    """Ours, without clients: no fair queueing."""
    return run_engine([replace(job, client="") for job in jobs])


_FAIRNESS = {"ours": run_engine, "ours, clients unknown": _run_as_one_client}
_SERVERS = {"ours": run_engine, "lock": run_lock, "batching": run_request_batches}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    parser.add_argument(
        "--requests", type=int, default=2000, metavar="N", help="requests of each workload (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="seed of the workloads (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Runs every workload on every server, prints a table and writes a JSON file."""
    capacity = 1 / statistics.mean(job.alone for job in mixed_jobs(arguments.requests, 1.0, arguments.seed))
    loads = {f"{load:g} x the capacity of (a)": load for load in (0.5, 0.8, 1.2, 2.0, 2.6)}
    workloads = {name: mixed_jobs(arguments.requests, load * capacity, arguments.seed) for name, load in loads.items()}
    table = Table("workload", "server", "requests/s", "p50 ms", "p95 ms", "p99 ms", "slowdown p50", "slowdown p95")
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name, jobs in workloads.items():
        figures[name] = {server: _figures(jobs, jobs, drive(jobs)) for server, drive in _SERVERS.items()}
    jobs = short_among_long(400)
    short = [job for job in jobs if job.steps == 4]
    figures["4 steps among 50"] = {
        server: _figures(short, jobs, [took for job, took in zip(jobs, drive(jobs), strict=True) if job.steps == 4])
        for server, drive in _SERVERS.items()
    }
    jobs = few_among_a_flood(arguments.requests)
    figures["50 steps among a flood of 20"] = {
        server: _figures(_of_few(jobs), jobs, _of_few(jobs, drive(jobs))) for server, drive in _FAIRNESS.items()
    }
    for name, servers in figures.items():
        for server, row in servers.items():
            table.add_row(name, server, *(f"{value:.1f}" for value in row.values()))
    for clients in (8, 16, 32):
        count = max(arguments.requests // 5, 10 * clients)
        rates = {server: count / drive(Alike(clients, count)) for server, drive in _ALIKE.items()}
        figures[f"{clients} clients, all 20 steps"] = {server: {"rate": rate} for server, rate in rates.items()}
        for server, rate in rates.items():
            table.add_row(f"{clients} clients, all 20 steps", server, f"{rate:.1f}")
    Console(width=110).print(table)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def _of_few(jobs: Sequence[Job], values: Sequence[Any] | None = None) -> list[Any]:
    """The `values`, or the jobs, of the client with few requests."""
    return [value for job, value in zip(jobs, jobs if values is None else values, strict=True) if job.client == "few"]


def _figures(measured: Sequence[Job], jobs: Sequence[Job], took: Sequence[float]) -> dict[str, float]:
    """Requests per second, latencies in milliseconds, and slowdowns relative to an idle device."""
    slowdowns = [seconds / job.alone for job, seconds in zip(measured, took, strict=True)]
    end = max(job.arrival + seconds for job, seconds in zip(measured, took, strict=True))
    return {
        "rate": len(measured) / (end - jobs[0].arrival),
        **{f"p{percent}": percentile(took, percent) * 1e3 for percent in (50, 95, 99)},
        "slowdown p50": percentile(slowdowns, 50),
        "slowdown p95": percentile(slowdowns, 95),
    }

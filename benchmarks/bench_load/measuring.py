"""Runs the comparison: starts the servers, calibrates, and runs each workload on each server in rounds.

The servers take turns within each workload, in a rotating order, so that other load of the machine affects all alike.
"""

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from rich.console import Console

from bench_load.families import Family, files_of
from bench_load.figures import MEASURED, Run
from bench_load.images import largest_difference, render
from bench_load.sending import Sender, among, closed_loop, connected, open_loop
from bench_load.servers import SERVERS, ServerProcess, command, ending
from bench_load.trace import Trace, last_part, read_trace
from bench_load.workloads import (
    SIZES,
    WORKLOADS,
    Job,
    Source,
    Workload,
    arrivals,
    draw_mixed,
    draw_short,
    generator,
    jobs,
    jobs_worth,
)

CALIBRATION_JOBS = 24
TRACE_PAUSE = 1.5
"""Seconds without work that separate the warm-up in the trace from the measured part."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a comparison."""

    servers: tuple[str, ...]
    workloads: tuple[str, ...]
    seconds: float
    rounds: int
    seed: int
    folder: Path
    """The folder of logs and traces."""
    family: Family | None = None
    """The kind of the model, None for the demo's."""

    def command(self, name: str) -> list[str]:
        """The command line of a server."""
        if self.family is None:
            return command(name)
        return command(name, *files_of(self.family), in_pytorch=True)

    def description(self, name: str) -> str:
        """What a server is, in words."""
        return SERVERS[name] if self.family is None else SERVERS[name].replace("optimum's pipeline", "diffusers on PyTorch")

    def adapted(self, drawn: Iterable[Job]) -> Iterator[Job]:
        """The jobs as the model takes them."""
        return (job if self.family is None else self.family.adapted(job) for job in drawn)


@dataclass(slots=True)
class Results:
    """The results of a comparison."""

    speed: float = 0.0
    """Units of work (see workloads) per second of the server used for calibration."""
    requests_per_second: float = 0.0
    """Mixed requests per second of that server."""
    differences: dict[str, int] = field(default_factory=dict)
    """Server -> the largest difference of its images from those of the first server, of 255."""
    runs: list[Run] = field(default_factory=list)
    trace: Trace | None = None


class Measurement:
    """One run of `scripts/bench load`."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self._settings = settings
        self._say = console.print
        self._servers = {name: ServerProcess(name, settings.command(name), settings.folder) for name in settings.servers}
        self._results = Results()

    async def run(self) -> Results:
        """Measures everything and ends all servers. Raises ServerFailed if a server does not start."""
        with ending(self._servers.values()):
            await self._start()
            await self._calibrate()
            for round_ in range(self._settings.rounds):
                for number, name in enumerate(self._settings.workloads):
                    await self._compare(WORKLOADS[name], round_, round_ + number)
        return self._results

    async def _start(self) -> None:
        """Starts and warms the servers one by one, and compares their images."""
        reference: list[bytes] = []
        for server in self._servers.values():
            self._say(f"[bench] starting {server.name}")
            server.spawn()
            await asyncio.to_thread(server.wait)
            async with connected(server.target) as sender:
                await closed_loop(sender, [job for job in self._warm_up_jobs() for _ in range(4)], 16)
                made = [await sender.send(job) for job in self._settings.adapted(_reference_jobs())]
            if errors := {record.error for record in sender.records} - {""}:
                self._say(f"[bench] {server.name} answers some requests with {', '.join(errors)}")
            reference = reference or made
            pairs = [pair for pair in zip(reference, made, strict=True) if all(pair)]
            self._results.differences[server.name] = max((largest_difference(*pair) for pair in pairs), default=256)
            server.pause()

    async def _calibrate(self) -> None:
        """Measures the work per second of peer "lock" (or else of the first server), which determines list lengths and rates."""
        server = self._servers.get("lock") or next(iter(self._servers.values()))
        source_of = generator(self._settings.seed, "calibration")
        drawn = list(self._settings.adapted(draw_mixed(source_of) for _ in range(CALIBRATION_JOBS)))
        run = await self._on(server, Workload("calibration", "", draw_mixed, concurrency=16), drawn, 0)
        self._results.speed = sum(record.units for record in run.answered) / run.span
        self._results.requests_per_second = len(run.answered) / run.span
        self._say(f"[bench] {server.name} answers {self._results.requests_per_second:.2f} mixed requests per second")

    async def _compare(self, workload: Workload, round_: int, turn: int) -> None:
        """Runs the same list on every server, in turns."""
        units = self._results.speed * self._settings.seconds * workload.share * (workload.load or 1.0)
        least = max(2 * workload.concurrency, 4)
        drawn = jobs_worth(workload.draw, generator(self._settings.seed, workload.name, round_), units, least)
        drawn = list(self._settings.adapted(drawn))
        names = list(self._servers)
        turn %= len(names)
        for name in names[turn:] + names[:turn]:
            run = await self._on(self._servers[name], workload, drawn, round_)
            self._results.runs.append(run)
            failed = sum(bool(record.error) for record in run.records if record.role in MEASURED)
            self._say(
                f"[bench] round {round_ + 1} of {self._settings.rounds}, {workload.name}, {name}: "
                f"{len(run.answered)} answers in {run.span:.1f} s" + (f", {failed} errors" if failed else "")
            )

    async def _on(self, server: ServerProcess, workload: Workload, drawn: list[Job], round_: int) -> Run:
        """Resumes one server, warms it, runs one list on it, and pauses it when it is idle."""
        for job in drawn:
            render(job.source)
        server.resume()
        async with connected(server.target) as sender:
            await closed_loop(sender, self._warm_up_jobs(), 2)
        async with connected(server.target, stream=bool(workload.load) and server.name == "ours") as sender:
            begun = server.cpu_seconds
            await self._send(sender, workload, drawn, round_)
            cpu = server.cpu_seconds - begun
        records = tuple(record for record in sender.records if record.role != "background")
        async with connected(server.target) as sender:
            await closed_loop(sender, self._warm_up_jobs()[:1], 1)
        server.pause()
        return Run(server.name, workload.name, round_, records, cpu)

    def _warm_up_jobs(self) -> list[Job]:
        return list(self._settings.adapted(_warm_up_jobs()))

    async def _send(self, sender: Sender, workload: Workload, drawn: list[Job], round_: int) -> None:
        source_of = generator(self._settings.seed, workload.name, round_, "times")
        if workload.foreground is not None:
            background = self._settings.adapted(jobs(workload.draw, generator(self._settings.seed, workload.name, round_)))
            foreground = self._settings.adapted(jobs(workload.foreground, source_of))
            pauses = _pauses(generator(self._settings.seed, workload.name, round_, "pauses"))
            seconds = 1.5 * self._settings.seconds * workload.share
            await among(sender, background, workload.concurrency, foreground, pauses, seconds)
        elif workload.load:
            rate = workload.load * self._results.speed * len(drawn) / sum(job.units for job in drawn)
            await open_loop(sender, drawn, arrivals(source_of, len(drawn), rate))
        else:
            await closed_loop(sender, drawn, workload.concurrency)


async def record_trace(settings: Settings, speed: float, console: Console) -> Trace:
    """Runs the saturation workload on another server with a trace. Returns the trace of the workload."""
    console.print("[bench] saturation again, with a trace")
    path = settings.folder / "trace.json"
    path.unlink(missing_ok=True)
    server = ServerProcess("traced", [*command("ours"), "--trace", str(path)], settings.folder)
    drawn = jobs_worth(draw_mixed, generator(settings.seed, "saturation", 0), speed * settings.seconds, 32)
    with ending([server]):
        server.spawn()
        await asyncio.to_thread(server.wait)
        async with connected(server.target) as sender:
            await closed_loop(sender, _warm_up_jobs(), 2)
            await asyncio.sleep(TRACE_PAUSE)
            await closed_loop(sender, drawn, WORKLOADS["saturation"].concurrency)
    trace = read_trace(path)
    return Trace(tuple(last_part(trace.calls, TRACE_PAUSE * 0.8)), trace.caches)


def _warm_up_jobs() -> list[Job]:
    return [
        Job("rolling hills", Source(size=size), 4, 1.0, guidance, seed=number)
        for number, (size, guidance) in enumerate(((SIZES[0], 7.5), (SIZES[1], 7.5), (SIZES[0], 1.0)))
    ]


def _reference_jobs() -> list[Job]:
    source_of = generator(0, "reference")
    return [draw_short(source_of), *(draw_mixed(source_of) for _ in range(3))]


def _pauses(source_of: Random) -> Iterator[float]:
    while True:
        yield source_of.uniform(0.0, 0.6)

"""A run: measure the capacity, load the server beyond it, check it when idle, stop it."""

import asyncio
import random
import subprocess
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

import grpc
from img2img.v1 import image_to_image_pb2 as pb

from soak_parts.access import Access
from soak_parts.calls import PATIENCE, Connection, check_images, follow
from soak_parts.ledger import Violated
from soak_parts.process import ServingProcess
from soak_parts.strangers import Strangers
from soak_parts.traffic import KINDS, Traffic
from soak_parts.watching import Watch

_CONCURRENCY = 32
"""Callers in a closed loop: as many as the engine has active requests."""
_PROGRESS_EVERY = 10.0
_LEAST_SPELL = 6.0
"""Minimum seconds of load between two idle phases."""
_SPELLS = 24
_MEASURED = 0.1
"""Duration of a capacity measurement, as a share of an interval of load."""
_KILL_EVERY, _UNLOAD_EVERY = 12.0, 20.0
_DRAINED = 6
"""Requests in progress at SIGTERM."""
_STOP_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Load:
    """The load: `factor` times `capacity` images per second, for `seconds`."""

    seconds: float
    capacity: float
    factor: float

    @property
    def rate(self) -> float:
        """Operations per second, such that valid requests for images are `factor` times the capacity."""
        shares = {name: kind.share for name, kind in KINDS.items()}
        asking = sum(share for name, share in shares.items() if not name.startswith("bad"))
        return self.factor * self.capacity * sum(shares.values()) / asking


async def measure_capacity(traffic: Traffic, seconds: float) -> float:
    """Images per second of callers in a closed loop."""
    done, end, begun = 0, time.monotonic() + seconds, time.monotonic()

    async def caller() -> None:
        nonlocal done
        while time.monotonic() < end:
            await traffic.perform("plain")
            done += 1

    await asyncio.gather(*(caller() for _ in range(_CONCURRENCY)))
    return done / (time.monotonic() - begun)


class Driver:
    """Sends `load` by `traffic` in intervals. After each the server must become idle, and the capacity is measured again."""

    def __init__(
        self,
        traffic: Traffic,
        watch: Watch,
        hostile: Strangers | None,
        load: Load,
        dice: random.Random,
        say: Callable[[str], None],
    ) -> None:
        self._traffic = traffic
        self._hostile = hostile
        self._watch = watch
        self._load = load
        self._dice = dice
        self._say = say
        self._tasks: set[asyncio.Task[object]] = set()
        self.capacities = [load.capacity]

    async def run(self) -> None:
        """Runs all intervals. Afterwards the server is idle."""
        sampling = asyncio.create_task(self._watch.sample())
        spell = max(_LEAST_SPELL, self._load.seconds / _SPELLS)
        end = self._watch.begun + self._load.seconds
        try:
            while time.monotonic() < end:
                await self._spell(min(end, time.monotonic() + spell))
                await self._rest()
                if time.monotonic() < end:
                    await self._measure(_MEASURED * spell)
                if self._hostile is not None:
                    self._hostile.resume()
        finally:
            sampling.cancel()

    async def _spell(self, end: float) -> None:
        """Sends operations until `end` at random times (open loop)."""
        killing, unloading, saying = (
            time.monotonic() + self._dice.uniform(0, every) for every in (_KILL_EVERY, _UNLOAD_EVERY, _PROGRESS_EVERY)
        )
        self._perform(self._traffic.small_tenant(lambda: time.monotonic() < end))
        while (now := time.monotonic()) < end:
            self._send(self._traffic.draw())
            if now >= killing:
                self._send("killed client")
                killing = now + _KILL_EVERY
            if now >= unloading:
                self._send("unload")
                unloading = now + _UNLOAD_EVERY
            if now >= saying:
                self._say(self._progress())
                saying = now + _PROGRESS_EVERY
            await asyncio.sleep(self._dice.expovariate(self._load.rate))

    async def _measure(self, seconds: float) -> None:
        """Measures the current capacity: the load of the machine may have changed."""
        capacity = await measure_capacity(self._traffic, seconds)
        self.capacities.append(capacity)
        self._load = replace(self._load, capacity=capacity)

    async def _rest(self) -> None:
        """Waits until every operation has ended, unloads the second model, and records the state of the idle server."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=PATIENCE + 60)
            for task in late:
                task.cancel()
        await self._traffic.perform("unload")
        if self._hostile is not None:
            await self._hostile.pause()
        await self._watch.rest()
        vitals = self._watch.checkpoints[-1].vitals
        self._say(
            f"idle: {vitals.rss / 2**20:.1f} MiB, {vitals.descriptors} descriptors, {vitals.threads} threads; {self._progress()}"
        )

    def _send(self, kind: str) -> None:
        self._perform(self._traffic.perform(kind))

    def _perform(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _progress(self) -> str:
        ledger = self._traffic.ledger
        seconds = time.monotonic() - self._watch.begun
        return (
            f"{seconds:.0f} s: {sum(ledger.issued.values())} operations, {ledger.count('image')} with images, "
            f"{ledger.count('refused')} refused, {ledger.in_flight} in progress, {ledger.violation_count} violations"
        )


async def drain(server: ServingProcess, access: Access, traffic: Traffic) -> tuple[int, float]:
    """Stops the server while requests run; each of them must succeed. Returns the exit status and the seconds it took."""
    ledger = traffic.ledger
    async with Connection(server.target, access) as connection:
        accepted = [asyncio.Event() for _ in range(_DRAINED)]

        async def ask(heard: asyncio.Event) -> None:
            number, ending = ledger.begin("stream"), "wrong"
            subject = next(iter(traffic.references))
            request = pb.TransformStreamRequest(request=subject.message())
            try:
                check_images(
                    await follow(connection.images.TransformStream(request, timeout=PATIENCE), started=heard),
                    traffic.references[subject],
                )
                ending = "image"
            except (grpc.aio.AioRpcError, Violated) as error:
                ledger.violate(f"a request in progress at SIGTERM: {error}")
            heard.set()
            ledger.end(number, ending)

        asking = [asyncio.create_task(ask(heard)) for heard in accepted]
        await asyncio.gather(*(heard.wait() for heard in accepted))
        begun = time.monotonic()
        server.terminate()
        await asyncio.gather(*asking)
    try:
        status = await asyncio.to_thread(server.wait, _STOP_SECONDS)
    except subprocess.TimeoutExpired:
        ledger.violate(f"the server did not end within {_STOP_SECONDS:g} s of SIGTERM")
        status = -1
    if status:
        ledger.violate(f"the server ended with status {status} after SIGTERM")
    return status, time.monotonic() - begun

"""Three servers in processes of their own, with callers of both clients: one drains, one is killed, and no caller sees an error.

The servers are `img2img serve` with a fake model whose images are computed from prompt, seed and steps; every image is compared
with the expected one. The revision of a server's bundle identifies the server.
"""

import asyncio
import dataclasses
import io
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import REPOSITORY
from img2img_client import (
    AsyncClient,
    Client,
    Completed,
    Progress,
    Queued,
    RetryPolicy,
    Started,
    TransformEvent,
    TransformOptions,
    TransformResult,
)
from img2img_server.bundle.manifest import read_manifest, write_manifest
from PIL import Image
from soak_parts.images import noise, png
from soak_parts.stand_in import STEP_SECONDS, expected, plant

PATIENCE = 60.0
SOURCE = png(noise((64, 64), 1))
UNARY_STEPS, STREAM_STEPS = 4, 25
STREAMS = 2
"""Callers of each client that stream; one more of each does not."""


class Process:
    """A server's process, on a port that stays its own."""

    def __init__(self, folder: Path, number: int) -> None:
        self.name = f"server-{number}"
        self._folder = folder / self.name
        bundle = plant(self._folder / "models", "m")
        manifest = read_manifest(bundle)
        source = dataclasses.replace(manifest.source, revision=self.name)
        write_manifest(bundle, dataclasses.replace(manifest, source=source))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.target = f"127.0.0.1:{self.port}"
        self.process = self.start()

    def start(self) -> "subprocess.Popen[bytes]":
        words = ["--models", str(self._folder / "models"), "--port", str(self.port), "--assets", "none", "--warm-up", "0"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "benchmarks"), STEP_SECONDS: "0.01"}
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "soak_parts.stand_in", *words], env=environment, stdout=log, stderr=log
            )
        return self.process

    def wait_until_ready(self) -> None:
        with Client(self.target) as client:
            client.wait_until_ready(PATIENCE)


class Ledger:
    """The outcomes of all calls, with waits for them. `made` counts results by the number of the phase of their request, and by
    server.
    """

    def __init__(self) -> None:
        self.made: Counter[tuple[int, str]] = Counter()
        self.phase = 0
        self.streams_lost = 0
        self.running: dict[int, int] = {}
        self.stop = False
        self._changed = threading.Condition()

    def note(self, change: Callable[[], None]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()

    def until(self, reached: Callable[[], bool], what: str) -> None:
        with self._changed:
            assert self._changed.wait_for(reached, PATIENCE), f"{what}: {self.made}"

    def made_by(self) -> set[str]:
        """The servers that made the results of requests of this phase."""
        return {name for phase, name in self.made if phase == self.phase}

    def follow(self, caller: int, event: TransformEvent) -> None:
        step = event.step if isinstance(event, Progress) else 0
        self.note(lambda: self.running.__setitem__(caller, step))

    def lost_one(self) -> None:
        def change() -> None:
            self.streams_lost += 1

        self.note(change)

    def check(self, phase: int, result: TransformResult, prompt: str, seed: int, steps: int, count: int) -> None:
        """The right images, for a call of any caller."""
        assert [image.seed for image in result.images] == list(range(seed, seed + count))
        with Image.open(io.BytesIO(SOURCE)) as source:
            for image in result.images:
                assert image.image.tobytes() == expected(source, prompt, image.seed, steps).tobytes()
        self.note(lambda: self.made.update([(phase, result.model_revision)]))

    def check_life(self, phase: int, events: Sequence[TransformEvent], prompt: str) -> None:
        """The events of an undisturbed stream: each step once and in order, and the images of the reported seeds."""
        kinds = [type(event) for event in events if not isinstance(event, Queued)]
        assert kinds == [Started, *[Progress] * STREAM_STEPS, Completed]
        assert isinstance(events[0], Queued)
        assert [event.step for event in events if isinstance(event, Progress)] == list(range(1, STREAM_STEPS + 1))
        (started,) = (event for event in events if isinstance(event, Started))
        last = events[-1]
        assert isinstance(last, Completed)
        self.check(phase, last.result, prompt, started.seed, STREAM_STEPS, count=2)


def options(prompt: str, steps: int, *, seed: int = -1, count: int = 1) -> TransformOptions:
    fixed: TransformOptions = {"strength": 1.0, "guidance_scale": 1.0}
    return {**fixed, "prompt": prompt, "num_inference_steps": steps, "seed": seed, "image_count": count}


def call(targets: Sequence[str], ledger: Ledger) -> None:
    """A caller that is given its images at once."""
    with Client(targets, timeout=PATIENCE) as client:
        for number in itertools.takewhile(lambda _: not ledger.stop, itertools.count()):
            phase, prompt = ledger.phase, f"image {number}"
            result = client.transform(SOURCE, **options(prompt, UNARY_STEPS, seed=number))
            ledger.check(phase, result, prompt, number, UNARY_STEPS, count=1)


def stream(client: Client, caller: int, ledger: Ledger) -> None:
    """A caller that follows its images."""
    for number in itertools.takewhile(lambda _: not ledger.stop, itertools.count()):
        phase, events, prompt = ledger.phase, [], f"stream {caller} {number}"
        with client.transform_stream(SOURCE, **options(prompt, STREAM_STEPS, count=2)) as life:
            for event in life:
                ledger.follow(caller, event)
                events.append(event)
        ledger.check_life(phase, events, prompt)


async def call_async(client: AsyncClient, ledger: Ledger) -> None:
    number = 1_000
    while not ledger.stop:
        phase, number, prompt = ledger.phase, number + 1, f"async {number}"
        result = await client.transform(SOURCE, **options(prompt, UNARY_STEPS, seed=number))
        await asyncio.to_thread(ledger.check, phase, result, prompt, number, UNARY_STEPS, 1)


async def stream_async(client: AsyncClient, caller: int, ledger: Ledger) -> None:
    for number in itertools.takewhile(lambda _: not ledger.stop, itertools.count()):
        phase, events, prompt = ledger.phase, [], f"async {caller} {number}"
        async with client.transform_stream(SOURCE, **options(prompt, STREAM_STEPS, count=2)) as life:
            async for event in life:
                ledger.follow(caller, event)
                events.append(event)
        ledger.check_life(phase, events, prompt)


async def asynchronous(targets: Sequence[str], ledger: Ledger, policy: RetryPolicy) -> None:
    async with AsyncClient(targets, timeout=PATIENCE) as one, AsyncClient(targets, timeout=PATIENCE, retries=policy) as other:
        streams = (stream_async(other, caller, ledger) for caller in range(STREAMS, 2 * STREAMS))
        await asyncio.gather(call_async(one, ledger), *streams)


@contextmanager
def callers(targets: Sequence[str], ledger: Ledger) -> Iterator[list["Future[None]"]]:
    """Callers of both clients, until the block is left."""
    policy = RetryPolicy(on_retry=lambda attempt, error, wait: ledger.lost_one())
    with Client(targets, timeout=PATIENCE, retries=policy) as client, ThreadPoolExecutor(STREAMS + 2) as pool:
        work = [pool.submit(call, targets, ledger)]
        work += [pool.submit(stream, client, caller, ledger) for caller in range(STREAMS)]
        work += [pool.submit(asyncio.run, asynchronous(targets, ledger, policy))]
        for each in work:  # A failure of one of them ends the wait.
            each.add_done_callback(lambda done: ledger.note(lambda: None))
        try:
            yield work
        finally:
            ledger.stop = True


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[Process]]:
    made = [Process(tmp_path, number) for number in range(3)]
    try:
        for server in made:
            server.wait_until_ready()
        yield made
    finally:
        for server in made:
            server.process.kill()
            server.process.wait(PATIENCE)


@pytest.mark.timeout(300)
def test_callers_see_no_error_when_one_server_drains_and_another_is_killed(servers: list[Process]) -> None:
    ledger = Ledger()
    names = [server.name for server in servers]

    def all_made(wanted: Sequence[str]) -> bool:
        return all(ledger.made[ledger.phase, name] >= 3 for name in wanted)

    def most_streams_are_midway() -> bool:
        return sum(2 <= step <= STREAM_STEPS // 2 for step in ledger.running.values()) >= STREAMS

    with callers([server.target for server in servers], ledger) as work:

        def until(reached: Callable[[], bool], what: str) -> None:
            ledger.until(lambda: any(each.done() for each in work) or reached(), what)
            for each in work:
                assert not each.done() or each.result()

        until(lambda: all_made(names), "all three are used")

        until(most_streams_are_midway, "streams run")
        servers[0].process.send_signal(signal.SIGTERM)
        assert servers[0].process.wait(PATIENCE) == 0
        ledger.phase += 1
        until(lambda: all_made(names[1:]), "two are used")
        assert ledger.made_by() == set(names[1:])

        until(most_streams_are_midway, "streams run")
        before = ledger.streams_lost
        servers[1].process.kill()
        until(lambda: ledger.streams_lost > before, "streams were lost, and went on")
        servers[1].process.wait(PATIENCE)
        ledger.phase += 1
        until(lambda: all_made(names[2:]), "one is used")
        assert ledger.made_by() == set(names[2:])

        for server in servers[:2]:
            server.start()
        until(lambda: all_made(names), "who comes back is used again")
    for each in work:
        each.result()

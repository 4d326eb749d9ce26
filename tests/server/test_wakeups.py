"""A request wakes the server's event loop few times, however many steps it has: the loop's callbacks are counted, not seconds."""

import asyncio
import gc
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fakes import FakePipeline, make_request
from img2img_client import Client
from img2img_server.api import parsing
from img2img_server.api.parsing import Parser
from img2img_server.codecs import pool
from img2img_server.codecs.pool import _Guard
from img2img_server.codecs.process import CodecProcess
from img2img_server.config import ServerConfig
from img2img_server.engine.request import Plan, Request
from PIL import Image
from running import running_backend
from simulated_device import simulated

REQUESTS = 10
MOST = 40
"""Callbacks of the loop for a request: 33 on 2026-11-30, and 66 before. gRPC has 20 of them."""


@pytest.fixture
def callbacks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the callbacks that event loops run, by the name of their thread."""
    counted: Counter[str] = Counter()
    run = asyncio.Handle._run

    def counting(handle: asyncio.Handle) -> None:
        counted[threading.current_thread().name] += 1
        run(handle)

    monkeypatch.setattr(asyncio.Handle, "_run", counting)
    return counted


@contextmanager
def client_of_a_server() -> Iterator[Client]:
    """A client of a server whose device takes no time, after a few requests."""
    with (
        running_backend(lambda config: simulated(config, 0.0)) as server,
        Client(f"127.0.0.1:{server.port}", timeout=60) as client,
    ):
        for steps in (1, 30):
            transform(client, steps)
        yield client


def transform(client: Client, steps: int) -> None:
    client.transform(Image.new("RGB", (64, 64)), prompt="", seed=1, num_inference_steps=steps, strength=1.0)


def test_a_request_wakes_the_event_loop_few_times_for_any_number_of_steps(callbacks: Counter[str]) -> None:
    with client_of_a_server() as client:
        for steps in (1, 30):
            callbacks.clear()
            for _ in range(REQUESTS):
                transform(client, steps)
            assert 10 < callbacks["test-server"] / REQUESTS <= MOST


class _Process(CodecProcess):
    """Counts kills."""

    kills = 0

    def kill(self) -> None:
        self.kills += 1


@pytest.mark.parametrize(("ended", "kills"), [(True, 0), (False, 1)], ids=["job has ended", "job still runs"])
async def test_only_a_job_that_still_runs_is_killed_after_its_caller_has_left(
    monkeypatch: pytest.MonkeyPatch, ended: bool, kills: int
) -> None:
    """The process of one that has ended may be in another caller's job."""
    monkeypatch.setattr(pool, "_GRACE", 0.0)
    guard, process = _Guard(), _Process()
    guard.begin(process)
    if ended:
        guard.end()
    guard.leave()
    for _ in range(5):
        await asyncio.sleep(0)
    assert process.kills == kills


async def test_a_job_that_begins_after_its_caller_has_left_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_GRACE", 0.0)
    guard, process = _Guard(), _Process()
    guard.leave()
    guard.begin(process)
    for _ in range(5):
        await asyncio.sleep(0)
    assert process.kills == 1


async def test_a_pipeline_plans_a_new_kind_of_request_on_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one can take long: OpenVINO opens graphs in it. A pipeline may have the address of one that was unloaded, as all
    have here."""
    monkeypatch.setattr(parsing, "id", lambda _: 0, raising=False)
    unused: Any = None
    parser, threads = Parser(ServerConfig(), unused, time.monotonic, unused), []

    class Noting(FakePipeline):
        def plan(self, request: Request) -> Plan:
            threads.append(threading.current_thread())
            return super().plan(request)

    async def is_on_this_thread(pipeline: FakePipeline, request: Request) -> bool:
        await parser._plan(pipeline, request)
        return threads[-1] is threading.current_thread()

    pipeline = Noting()
    small, large = (Image.new("RGB", (side, side)) for side in (64, 96))
    same_size: dict[str, Any] = {"size": (64, 64)}
    requests = [
        make_request(image=small, **same_size),
        make_request(image=large, **same_size),
        make_request(image=small, references=(large,), **same_size),
    ]
    for request in requests:
        assert not await is_on_this_thread(pipeline, request)
        assert await is_on_this_thread(pipeline, request)
    assert len(parser._planned) == 1
    del pipeline
    gc.collect()
    assert not parser._planned, "of pipelines that were unloaded"
    assert not await is_on_this_thread(Noting(), requests[0])

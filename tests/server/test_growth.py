"""The engine's work per step, arrival, cancellation and progress update does not grow with the number of waiting requests.

It is counted in executed lines of the engine's code, not seconds: 500 waiting requests may take few more than 100.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import img2img_server.engine
import pytest
from fakes import Clock, FakePipeline, make_request
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Event, Plan, Request, Ticket
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.engine.warmup import WarmUp

FEW, MANY = 100, 500
STEP = 0.005
"""Seconds of a call."""
_PACKAGE = str(Path(img2img_server.engine.__file__).parent)


class Lines:
    """How many lines of the engine's package ran."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts those that run on this thread within the block."""
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)

    def _call(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        return self._line if frame.f_code.co_filename.startswith(_PACKAGE) else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        self.count += event == "line"
        return self._line


class ShapedPipeline(FakePipeline):
    """The shape of a request is its prompt, so a test can have any number of shapes."""

    def plan(self, request: Request) -> Plan:
        plan = super().plan(request)
        return replace(plan, shape=request.prompt, pixels=64 + len(request.prompt))


@dataclass(frozen=True, slots=True)
class Load:
    """How the waiting requests differ: the client, shape, model, steps and deadline of each, by its number."""

    client: Callable[[int], str] = lambda number: ""
    shape: Callable[[int], str] = lambda number: "one"
    model: Callable[[int], str] = lambda number: "m0"
    patience: float | None = None

    def request(self, number: int, now: float) -> Request:
        deadline = None if self.patience is None else now + self.patience + number % 7
        return make_request(
            client=self.client(number),
            prompt=self.shape(number),
            model=self.model(number),
            num_inference_steps=20 + number % 11,
            deadline=deadline,
        )


LOADS = {
    "no client": Load(),
    "one client": Load(client=lambda number: "one"),
    "a client each": Load(client=lambda number: f"client {number}"),
    "fifty clients": Load(client=lambda number: f"client {number % 50}"),
    "a shape each": Load(shape=lambda number: f"shape {number}", client=lambda number: f"client {number % 7}"),
    "twenty models": Load(model=lambda number: f"m{number % 20}", client=lambda number: f"client {number % 50}"),
    "far deadlines": Load(patience=10_000.0, client=lambda number: f"client {number % 50}"),
}
URGENT = Load(patience=20.0, client=lambda number: f"client {number % 50}")
"""The deadlines of a seventh become urgent 19.4 s after their arrival."""


class Filled:
    """An engine in which `count` requests wait, and as many are active as may be. Calls take 5 ms of a manual clock."""

    def __init__(self, load: Load, count: int) -> None:
        self.load, self.clock, self.number = load, Clock(), 0
        self.events: list[Event] = []
        pipelines = {f"m{number}": ShapedPipeline(self.clock, lambda rows: STEP) for number in range(20)}
        limits = QueueLimits(max_waiting=10 * MANY, max_client_waiting=10 * MANY)
        self.engine = Engine(pipelines, limits, self.clock)
        for name, pipeline in pipelines.items():
            self.engine.costs.adopt(name, WarmUp(16, 1.0, self.clock).measure(name, pipeline))
        self.tickets = [self.submit() for _ in range(count)]
        if load is URGENT:
            self.clock.now += 19.6
        for _ in range(12):
            self.engine.step()

    def submit(self) -> Ticket:
        self.number += 1
        return self.engine.submit(self.load.request(self.number, self.clock.now), self.events.append).ticket

    def step(self) -> None:
        for _ in range(30):
            self.engine.step()

    def submit_some(self) -> None:
        for _ in range(20):
            self.submit()

    def cancel(self) -> None:
        for ticket in self.tickets[-40::2]:
            ticket.cancel()
            self.engine.step()

    def updates(self) -> None:
        for _ in range(20):
            self.clock.now += 1.5
            self.engine.step()


def lines(load: Load, count: int, work: Callable[[Filled], None]) -> int:
    filled, counter = Filled(load, count), Lines()
    with counter.counted():
        work(filled)
    filled.engine.close()
    return counter.count


def check(load: Load, work: Callable[[Filled], None], few_waiting: int = FEW) -> None:
    few, many = lines(load, few_waiting, work), lines(load, MANY, work)
    assert few > 1000, "the engine's lines are counted"
    assert many <= 1.2 * few


@pytest.mark.parametrize("work", [Filled.step, Filled.submit_some, Filled.cancel, Filled.updates], ids=lambda work: work.__name__)
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_work_per_step_does_not_grow_with_the_queue_length(load: Load, work: Callable[[Filled], None]) -> None:
    check(load, work)


@pytest.mark.parametrize("work", [Filled.step, Filled.submit_some, Filled.cancel], ids=lambda work: work.__name__)
def test_work_per_step_does_not_grow_with_urgent_deadlines(work: Callable[[Filled], None]) -> None:
    """Time has passed, so updates are due for all requests. For 400 requests, sending them lasts through the counted steps."""
    check(URGENT, work, few_waiting=400)

"""An engine thread stuck in the device is detected, reported to every waiting caller, and its requests end exactly once."""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from fakes import Caller, FakePipeline, FakeState, make_engine, make_request, run_out
from grpc_health.v1 import health_pb2, health_pb2_grpc
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server.backends.local import Watchdog
from img2img_server.engine.engine import Engine
from img2img_server.engine.interface import ModelCall
from img2img_server.engine.request import Completed, Event, Failed, Request
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.errors import EngineStuck, ShuttingDown
from messages import failure, request
from PIL import Image
from running import running, store

STAGES = ["plan", "prepare", "denoise", "advance", "preview", "finish", "release"]


class Hanging(FakePipeline):
    """Hangs in its first call of one stage until a test releases it."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage
        self.hangs, self.go, self.came_back = threading.Event(), threading.Event(), threading.Event()
        self.later: list[str] = []

    def _at(self, stage: str) -> None:
        if self.came_back.is_set():
            self.later.append(stage)
        if stage == self.stage and not self.hangs.is_set():
            self.hangs.set()
            assert self.go.wait(60)
            self.came_back.set()

    def prepare(self, requests: Sequence[Request]) -> Sequence[FakeState]:
        self._at("prepare")
        return super().prepare(requests)

    def denoise(self, states: Sequence[FakeState]) -> Sequence[int]:
        self._at("denoise")
        return super().denoise(states)

    def advance(self, states: Sequence[FakeState], noises: Sequence[int]) -> None:
        self._at("advance")
        super().advance(states, noises)

    def preview(self, states: Sequence[FakeState]) -> Sequence[Image.Image | None]:
        self._at("preview")
        return super().preview(states)

    def finish(self, states: Sequence[FakeState]) -> Sequence[Sequence[Image.Image]]:
        self._at("finish")
        return super().finish(states)

    def release(self, state: FakeState) -> None:
        self._at("release")
        super().release(state)


class Patient:
    """A caller that can be waited for."""

    def __init__(self, engine: Engine, **settings: object) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()
        self.ticket = engine.submit(make_request(preview_interval=1, **settings), self._listen).ticket

    def _listen(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Completed | Failed):
            self.ended.set()

    @property
    def error(self) -> Exception | None:
        assert isinstance(self.events[-1], Completed | Failed)
        return self.events[-1].error if isinstance(self.events[-1], Failed) else None


@pytest.fixture
def hanging() -> Iterator[Callable[[str], tuple[Engine, Hanging]]]:
    """A running engine whose model hangs in a stage, and is released at the end."""
    made: list[tuple[Engine, Hanging]] = []

    def make(stage: str) -> tuple[Engine, Hanging]:
        pipeline = Hanging(stage)
        engine = Engine({"m": pipeline}, QueueLimits(max_active=2, max_admitted=2))
        made.append((engine, pipeline))
        engine.start()
        return engine, pipeline

    yield make
    for engine, pipeline in made:
        pipeline.go.set()
        engine.close()


@pytest.mark.parametrize("stage", STAGES[1:])
def test_hanging_call_is_reported_once_by_name(stage: str, hanging: Callable[[str], tuple[Engine, Hanging]]) -> None:
    engine, pipeline = hanging(stage)
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    watchdog = Watchdog(engine, 0.2, said.put)
    watchdog.start()
    Patient(engine, seeds=(0, 1))
    line = said.get(timeout=120)
    assert f"{stage} of model 'm'" in line
    assert ("1 row" if stage == "prepare" else "2 rows") in line
    call = engine.stats.call
    assert call is not None
    assert (call.stage, call.model) == (stage, "m")
    assert engine.stats.call_seconds >= 0.2
    pipeline.go.set()
    watchdog.stop()
    assert said.empty()


def test_hanging_plan_is_detected_on_any_thread(
    hanging: Callable[[str], tuple[Engine, Hanging]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pipeline = hanging("plan")
    made = pipeline.plan

    def plan(asked: Request) -> object:
        pipeline._at("plan")
        return made(asked)

    monkeypatch.setattr(pipeline, "plan", plan)
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    watchdog = Watchdog(engine, 0.2, said.put)
    watchdog.start()
    with ThreadPoolExecutor(1) as callers:
        patient = callers.submit(Patient, engine)
        assert "plan of model 'm'" in said.get(timeout=120)
        pipeline.go.set()
        assert patient.result(120).ended.wait(120)
    watchdog.stop()


class Clockwork:
    """An engine as the watchdog sees it: each check finds the next of some calls, and the last one sets an event."""

    def __init__(self, *calls: ModelCall | None) -> None:
        self._calls = list(calls)
        self.looked = threading.Event()

    @property
    def current_call(self) -> ModelCall | None:
        if len(self._calls) == 1:
            self.looked.set()
            return self._calls[0]
        return self._calls.pop(0)


def test_many_short_calls_do_not_trigger_the_watchdog() -> None:
    calls = [ModelCall("denoise", "m", 1, 2, 0.04), None, ModelCall("finish", "m", 1, 2, 0.05)] * 10
    engine: object = Clockwork(*calls, None)
    said: list[str] = []
    watchdog = Watchdog(engine, 0.05, said.append)  # type: ignore[arg-type]
    watchdog.start()
    assert engine.looked.wait(120)  # type: ignore[attr-defined]
    watchdog.stop()
    assert said == []


class Stopped:
    """An engine in one call, and the clock of a process that is stopped (SIGSTOP) for a minute in the middle of it."""

    def __init__(self, comes_back: bool) -> None:
        self._now, self._looks, self._comes_back = 0.0, 0, comes_back
        self.came_back = threading.Event()

    def clock(self) -> float:
        self._looks += 1
        self._now += 60.0 if self._looks == 5 else 0.01
        return self._now

    @property
    def current_call(self) -> ModelCall | None:
        if self._comes_back and self._looks > 7:
            self.came_back.set()
            return None
        return ModelCall("denoise", "m", 1, 2, self._now)


def test_suspended_process_is_not_reported_as_stuck() -> None:
    said: list[str] = []
    engine: Any = Stopped(comes_back=True)
    watchdog = Watchdog(engine, 0.1, said.append, engine.clock)
    watchdog.start()
    assert engine.came_back.wait(120)
    watchdog.stop()
    assert said == []


def test_hanging_call_is_detected_after_the_process_was_suspended() -> None:
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    engine: Any = Stopped(comes_back=False)
    watchdog = Watchdog(engine, 0.1, said.put, engine.clock)
    watchdog.start()
    assert "denoise of model 'm'" in said.get(timeout=120)
    watchdog.stop()


def test_watchdog_with_zero_seconds_is_disabled() -> None:
    engine = Clockwork(ModelCall("denoise", "m", 1, 2, 1e9))
    watchdog = Watchdog(engine, 0.0, pytest.fail)  # type: ignore[arg-type]
    before = threading.active_count()
    watchdog.start()
    assert threading.active_count() == before
    watchdog.stop()
    assert not engine.looked.is_set()


def test_callback_may_stop_the_watchdog() -> None:
    told = threading.Event()

    def stuck(why: str) -> None:
        watchdog.stop()
        told.set()

    watchdog = Watchdog(Clockwork(ModelCall("denoise", "m", 1, 2, 1e9)), 0.01, stuck)  # type: ignore[arg-type]
    watchdog.start()
    assert told.wait(120)
    watchdog.stop()


@pytest.mark.parametrize("stage", STAGES[1:])
def test_abandon_fails_all_requests_exactly_once(
    stage: str, hanging: Callable[[str], tuple[Engine, Hanging]], caplog: pytest.LogCaptureFixture
) -> None:
    engine, pipeline = hanging(stage)
    first = Patient(engine, num_inference_steps=3)
    assert pipeline.hangs.wait(120)
    callers = [first, *(Patient(engine, num_inference_steps=3) for _ in range(5))]
    engine.abandon(EngineStuck("lost"))
    assert all(isinstance(caller.error, EngineStuck) for caller in callers), "all had ended when abandon returned"
    assert len({id(caller.error) for caller in callers}) == 6, "each its own error"
    with pytest.raises(EngineStuck):
        engine.submit(make_request(), lambda event: None)
    engine.close()  # does not wait for the thread, which still hangs
    told = [len(caller.events) for caller in callers]
    pipeline.go.set()
    assert pipeline.came_back.wait(120)
    engine._thread.join(120)
    assert not engine._thread.is_alive()
    assert pipeline.later == [], "the thread asked nothing more of the device"
    assert [len(caller.events) for caller in callers] == told
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], "nor did it stumble"
    assert engine.stats.waiting == engine.stats.active == 0


@pytest.mark.parametrize("when", ["prepare", "denoise", "finish"])
def test_abandon_during_a_model_call_ends_the_step(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, pipeline, _ = make_engine()
    callers = [Caller(engine).submit(num_inference_steps=1) for _ in range(3)]
    own = getattr(pipeline, when)

    def abandoned(*values: object) -> object:
        engine.abandon(EngineStuck("lost"))
        return own(*values)

    monkeypatch.setattr(pipeline, when, abandoned)
    assert not engine.step()
    assert not engine.step()
    engine.close()
    assert [type(caller.error) for caller in callers] == [EngineStuck] * 3
    assert pipeline.released == [], "nothing is asked of a device that does not answer"


def test_abandon_during_a_release_stops_further_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, pipeline, _ = make_engine()
    callers = [Caller(engine).submit() for _ in range(3)]
    engine.step()
    for caller in callers:
        assert caller.ticket is not None
        caller.ticket.cancel()
    own = pipeline.release

    def release(state: FakeState) -> None:
        engine.abandon(EngineStuck("lost"))
        own(state)

    monkeypatch.setattr(pipeline, "release", release)
    assert not engine.step()
    assert [type(caller.error) for caller in callers] == [EngineStuck] * 3
    assert len(pipeline.released) == 1


def test_abandon_unblocks_a_waiting_close(
    hanging: Callable[[str], tuple[Engine, Hanging]],
) -> None:
    engine, pipeline = hanging("denoise")
    caller = Patient(engine)
    assert pipeline.hangs.wait(120)
    with ThreadPoolExecutor(1) as others:
        closing = others.submit(engine.close)
        engine.abandon(EngineStuck("lost"))
        closing.result(120)
    assert isinstance(caller.error, EngineStuck | ShuttingDown)


def test_a_drain_ends_when_the_engine_is_abandoned(hanging: Callable[[str], tuple[Engine, Hanging]]) -> None:
    engine, pipeline = hanging("denoise")
    Patient(engine)
    assert pipeline.hangs.wait(120)
    with ThreadPoolExecutor(1) as others:
        drained = others.submit(engine.drain)
        engine.abandon(EngineStuck("lost"))
        assert drained.result(120)


def test_idle_engine_has_no_current_call() -> None:
    engine, _, _ = make_engine()
    assert (engine.stats.call_seconds, engine.stats.call, engine.current_call) == (0.0, None, None)
    Caller(engine).submit()
    run_out(engine)
    assert (engine.stats.call_seconds, engine.stats.call) == (0.0, None)


def test_hanging_device_ends_all_calls_with_an_error_and_the_server() -> None:
    pipeline = Hanging("denoise")
    with running(lambda: store(m=pipeline), watchdog=0.3, limits=QueueLimits(max_active=1)) as server:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            watching = health.Watch(health_pb2.HealthCheckRequest())
            assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
            stub = ImageToImageServiceStub(channel)
            calls = [stub.Transform.future(request()) for _ in range(4)]
            for call in calls:
                code, details = failure(call.result)
                assert (code, details["reason"]) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_STUCK")
            assert next(watching).status == health_pb2.HealthCheckResponse.NOT_SERVING
            code, details = failure(lambda: stub.Transform(request()))
            assert (code, details["reason"]) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_STUCK")
            assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watching.cancel()
        # The process waits for this before it exits, with the device still hanging.
        asyncio.run_coroutine_threadsafe(server.server.failed(), server.loop).result(120)
        server.stop().result(60)
        assert not pipeline.came_back.is_set()
        pipeline.go.set()
        assert pipeline.came_back.wait(120)
    assert pipeline.later == []

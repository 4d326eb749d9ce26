"""Every accepted request ends exactly once: a hypothesis state machine drives the engine with random arrivals of several clients,
cancellations, time, failing model calls, out of memory, replaced and removed models, draining, closing and abandoning (also
during a call), on fake pipelines and a manual clock."""

from dataclasses import replace
from typing import cast

import hypothesis.strategies as st
import pytest
from fakes import Caller, Clock, FakePipeline, make_engine, make_request, run_out
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Event, Failed
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.errors import (
    ClientBusy,
    DeadlineExpired,
    DeadlineUnmeetable,
    EngineStuck,
    ModelFailed,
    ModelNotLoaded,
    OutOfMemory,
    QueueFull,
    RequestCancelled,
    ServerError,
    ShuttingDown,
)
from PIL import Image

SHAPES = [Image.new("RGB", size) for size in ((8, 8), (16, 8))]
TROUBLES = ["", "", "", "", "fail prepare", "fail denoise", "fail advance", "fail preview", "fail finish", "fail release"]
TROUBLES += ["full prepare", "full denoise", "full finish"]


class RequestLifecycle(RuleBasedStateMachine):
    """An engine, its requests, and their outcomes."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        seconds = {1: 1.0, 2: 1.5, 3: 2.0, 4: 2.5}
        self.pipelines = {
            "batches": FakePipeline(self.clock, seconds=lambda rows: seconds[min(rows, 4)], codec_seconds=0.5),
            "alone": FakePipeline(self.clock, max_rows=1),
        }
        self.all_pipelines = list(self.pipelines.values())
        limits = QueueLimits(max_batch_size=4, max_active=3, max_waiting=4, max_admitted=2, max_client_waiting=3)
        self.limits = replace(limits, max_waiting_seconds=20.0)
        self.engine = Engine(self.pipelines, self.limits, self.clock)
        self.callers: list[Caller] = []
        self.draining = self.abandoned = False
        self.short = False

    @rule(
        settings=st.fixed_dictionaries(
            {
                "model": st.sampled_from(["batches", "batches", "alone"]),
                "image": st.sampled_from(SHAPES),
                "num_inference_steps": st.integers(1, 6),
                "seeds": st.sampled_from([(0,), (0, 1), (0, 1, 2)]),
                "prompt": st.sampled_from(TROUBLES),
                "preview_interval": st.integers(0, 2),
                "client": st.sampled_from(["", "a", "a", "b"]),
                "background": st.sampled_from([False, False, False, True]),
            }
        ),
        patience=st.none() | st.floats(0.5, 30.0),
        arrives=st.booleans(),
    )
    def submit(self, settings: dict[str, object], patience: float | None, arrives: bool) -> None:
        caller = Caller(self.engine)
        refusal: ServerError | None = None
        asked = {**settings, "deadline": None if patience is None else self.clock.now + patience}
        work = self.engine.stats.work_seconds
        try:
            if arrives:
                with self.engine.reserve(str(settings["client"])) as place:
                    caller.ticket = self.engine.submit(make_request(**asked), caller.events.append, place).ticket
            else:
                caller.submit(**asked)
        except (ShuttingDown, EngineStuck, ModelNotLoaded, QueueFull, ClientBusy, DeadlineUnmeetable) as error:
            refusal = error
        else:
            self.callers.append(caller)
            assert not self.draining
            assert settings["model"] in self.pipelines
        self._has_a_reason(refusal, asked, work)

    def _has_a_reason(self, refusal: ServerError | None, asked: dict[str, object], work: float | None) -> None:
        live = [caller.ticket.request for caller in self.callers if caller.ticket is not None and not caller.endings]
        if isinstance(refusal, ShuttingDown | EngineStuck):
            assert self.draining
            assert isinstance(refusal, EngineStuck) == self.abandoned
        elif isinstance(refusal, ModelNotLoaded):
            assert asked["model"] not in self.pipelines
        elif isinstance(refusal, QueueFull):
            assert refusal.retry_after >= 0.1
            assert self.unfinished >= 4 or (work is not None and work > 20.0)
        elif isinstance(refusal, ClientBusy):
            assert refusal.retry_after is not None
            assert refusal.retry_after >= 0.1
            assert sum(request.client == asked["client"] and not request.background for request in live) >= 3
        elif isinstance(refusal, DeadlineUnmeetable):
            assert refusal.estimate > cast(float, asked["deadline"]) - self.clock.now

    @precondition(lambda self: self.callers)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.callers)).ticket
        assert ticket is not None
        ticket.cancel()

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    @rule(seconds=st.floats(0.1, 10.0))
    def advance_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(pixels=st.none() | st.integers(1, 5 * 64))
    def change_memory(self, pixels: int | None) -> None:
        for pipeline in self.all_pipelines:
            pipeline.memory = pixels if pipeline.max_rows is None else None
        self.short |= pixels is not None

    @rule(model=st.sampled_from(["batches", "alone"]))
    def replace_engine(self, model: str) -> None:
        """The new pipeline continues with the states of the old one. A removed model is added again."""
        self.pipelines[model] = FakePipeline(self.clock, max_rows=1 if model == "alone" else None, codec_seconds=0.5)
        self.all_pipelines.append(self.pipelines[model])
        self.engine.replace(model, self.pipelines[model])

    @rule(model=st.sampled_from(["batches", "alone"]))
    def remove_model(self, model: str) -> None:
        live = [caller.ticket for caller in self.callers if caller.ticket is not None and not caller.endings]
        if model in self.pipelines and not any(ticket.request.model == model for ticket in live):
            self.engine.remove(model)
            del self.pipelines[model]

    @precondition(lambda self: not self.abandoned)
    @rule(stage=st.sampled_from(["", "", "prepare", "denoise", "advance", "finish"]))
    def abandon_engine(self, stage: str) -> None:
        """Between two steps (no stage), or during the next call of a stage."""
        if not stage:
            return self._abandon()
        for pipeline in self.all_pipelines:
            pipeline.before[stage] = self._abandon
        self.engine.step()
        for pipeline in self.all_pipelines:
            pipeline.before.clear()

    def _abandon(self) -> None:
        self.draining = self.abandoned = True
        self.calls_before_abandon = self._device_calls()
        self.engine.abandon(EngineStuck("lost"))
        assert self.unfinished == 0, "all had ended when it returned"

    def _device_calls(self) -> int:
        return sum(len(it.prepared) + len(it.batches) + len(it.decoded) + len(it.released) for it in self.all_pipelines)

    @rule()
    def drain(self) -> None:
        self.draining = True
        assert self.engine.drain(timeout=0) == (self.unfinished == 0)

    @invariant()
    def each_request_ends_once_and_has_no_later_events(self) -> None:
        for caller in self.callers:
            assert len(caller.endings) <= 1
            assert not caller.endings or caller.events[-1] is caller.endings[0]
            assert caller.steps == sorted(set(caller.steps))

    @invariant()
    def no_state_leaks(self) -> None:
        held = sum(len(pipeline.prepared) - len(pipeline.released) for pipeline in self.all_pipelines)
        assert self.abandoned or held <= min(3, self.unfinished), "only what is active holds memory"

    @invariant()
    def abandoned_device_gets_no_more_calls(self) -> None:
        # The call during which the engine was abandoned may still return, and counts then.
        assert not self.abandoned or self._device_calls() <= self.calls_before_abandon + 3

    @invariant()
    def client_limits_hold(self) -> None:
        live = [caller.ticket.request for caller in self.callers if caller.ticket is not None and not caller.endings]
        for client in ("a", "b"):
            assert sum(request.client == client and not request.background for request in live) <= 3
        assert self.engine.stats.arriving == 0

    def teardown(self) -> None:
        """Half of the runs are completed, the others are closed early."""
        cut = len(self.callers) % 2 == 0
        if not cut:
            for _ in range(1000):
                if not self.engine.step():
                    break
        self.engine.close()
        self.each_request_ends_once_and_has_no_later_events()
        assert self.unfinished == 0, "nothing hangs"
        prepared = [state for pipeline in self.all_pipelines for state in pipeline.prepared]
        released = [state for pipeline in self.all_pipelines for state in pipeline.released]
        assert len(set(released)) == len(released)
        assert self.abandoned or set(released) == set(prepared)
        for caller in self.callers:
            self._check_ending(caller, cut)

    def _check_ending(self, caller: Caller, cut: bool) -> None:
        ticket, (ending,) = caller.ticket, caller.endings
        assert ticket is not None
        if isinstance(ending, Completed):
            assert len(ending.images) == len(ticket.request.seeds)
            assert caller.steps[-1] == ticket.request.num_inference_steps
            return
        assert isinstance(ending, Failed)
        allowed = {
            RequestCancelled: ticket.cancelled,
            DeadlineExpired: ticket.request.deadline is not None,
            ModelFailed: ticket.request.prompt.startswith("fail ")
            and ticket.request.prompt not in ("fail preview", "fail release"),
            OutOfMemory: ticket.request.prompt.startswith("full ") or (self.short and ticket.request.model == "batches"),
            ShuttingDown: cut,
            EngineStuck: self.abandoned,
        }
        assert allowed[type(ending.error)], f"{ending.error!r} has no reason"

    @property
    def unfinished(self) -> int:
        return sum(not caller.endings for caller in self.callers)


TestRequestLifecycle = RequestLifecycle.TestCase
TestRequestLifecycle.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_raising_listener_does_not_affect_other_requests(caplog: pytest.LogCaptureFixture) -> None:
    """The other requests end, their states are released, and the engine closes."""

    def raising(event: Event) -> None:
        if isinstance(event, Completed | Failed):
            raise RuntimeError("the loop is closed")

    engine, pipeline, _ = make_engine()
    tickets = [engine.submit(make_request(), raising).ticket for _ in range(3)]
    listening = [Caller(engine).submit() for _ in range(3)]
    engine.step()
    for ticket in tickets[:2]:
        ticket.cancel()
    assert listening[0].ticket is not None
    listening[0].ticket.cancel()
    engine.step()
    assert all(ticket.ended for ticket in tickets[:2])
    assert isinstance(listening[0].error, RequestCancelled)
    run_out(engine)
    assert all(isinstance(caller.endings[0], Completed) for caller in listening[1:])
    assert len(pipeline.released) == 6
    assert engine.wait_until_idle("m")
    engine.close()
    assert caplog.text.count("failed to deliver the ending") == 3

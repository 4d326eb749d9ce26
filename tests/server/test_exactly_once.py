"""Every accepted request ends exactly once, whatever happens: a state machine drives the engine through random lives.

Arrivals, cancellations, passing time, failing model calls, memory that runs out, draining and closing come in any order that
hypothesis can think of, against a fake pipeline and a clock that is set by hand.
"""

import hypothesis.strategies as st
from fakes import Caller, Clock, FakePipeline
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Failed
from img2img_server.engine.scheduler import Limits
from img2img_server.errors import (
    DeadlineExpired,
    DeadlineUnmeetable,
    ModelFailed,
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


class Lives(RuleBasedStateMachine):
    """An engine, what was asked of it, and what became of that."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        seconds = {1: 1.0, 2: 1.5, 3: 2.0, 4: 2.5}
        self.pipelines = {
            "batches": FakePipeline(self.clock, seconds=lambda rows: seconds[min(rows, 4)], codec_seconds=0.5),
            "alone": FakePipeline(self.clock, max_rows=1),
        }
        limits = Limits(max_batch_size=4, max_active=3, max_waiting=4, max_admitted=2)
        self.engine = Engine(self.pipelines, limits, self.clock)
        self.callers: list[Caller] = []
        self.draining = False
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
            }
        ),
        patience=st.none() | st.floats(0.5, 30.0),
    )
    def submit(self, settings: dict[str, object], patience: float | None) -> None:
        caller = Caller(self.engine)
        refusal: ServerError | None = None
        try:
            caller.submit(**settings, deadline=None if patience is None else self.clock.now + patience)
        except (ShuttingDown, QueueFull, DeadlineUnmeetable) as error:
            refusal = error
        else:
            self.callers.append(caller)
        assert isinstance(refusal, ShuttingDown) == self.draining
        if isinstance(refusal, QueueFull):
            assert self.unfinished >= 4
        if isinstance(refusal, DeadlineUnmeetable):
            assert patience is not None
            assert refusal.estimate > patience

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
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(pixels=st.none() | st.integers(1, 5 * 64))
    def memory_comes_and_goes(self, pixels: int | None) -> None:
        self.pipelines["batches"].memory = pixels
        self.short |= pixels is not None

    @rule()
    def drain(self) -> None:
        self.draining = True
        assert self.engine.drain(timeout=0) == (self.unfinished == 0)

    @invariant()
    def nothing_is_answered_twice_or_told_after_its_end(self) -> None:
        for caller in self.callers:
            assert len(caller.endings) <= 1
            assert not caller.endings or caller.events[-1] is caller.endings[0]
            assert caller.steps == sorted(set(caller.steps))

    @invariant()
    def nothing_is_lost_and_nothing_leaks(self) -> None:
        held = sum(len(pipeline.prepared) - len(pipeline.released) for pipeline in self.pipelines.values())
        assert held <= min(3, self.unfinished), "only what is active holds memory"

    def teardown(self) -> None:
        """Half of the lives are run to their end, the others are cut short."""
        cut = len(self.callers) % 2 == 0
        if not cut:
            for _ in range(1000):
                if not self.engine.step():
                    break
        self.engine.close()
        self.nothing_is_answered_twice_or_told_after_its_end()
        assert self.unfinished == 0, "nothing hangs"
        for pipeline in self.pipelines.values():
            assert set(pipeline.released) == set(pipeline.prepared)
        for caller in self.callers:
            self._is_what_it_must_be(caller, cut)

    def _is_what_it_must_be(self, caller: Caller, cut: bool) -> None:
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
        }
        assert allowed[type(ending.error)], f"{ending.error!r} has no reason"

    @property
    def unfinished(self) -> int:
        return sum(not caller.endings for caller in self.callers)


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

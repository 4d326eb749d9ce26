"""Requests that are alike share full calls of every stage, and stay together, as well as if whole requests were batched."""

from collections import Counter
from collections.abc import Callable

import pytest
from fakes import Caller, FakePipeline, make_engine, run_out
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Event, Started
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.engine.warmup import WarmUp
from img2img_server.errors import QueueFull
from PIL import Image

STEPS, FULL = 20, 8
LIMITS = QueueLimits(max_batch_size=FULL)
WIDE = Image.new("RGB", (16, 8))

ON_A_CPU = {1: 7.3, 2: 6.6, 4: 5.8, 8: 5.4}
"""Milliseconds of each row by rows of a call, as of the demo model: a call of eight is only a fourth faster than calls of one."""


def on_a_cpu(rows: int) -> float:
    known = max(count for count in ON_A_CPU if count <= rows)
    return rows * ON_A_CPU[known] / 1e3


def measured_engine(limits: QueueLimits = LIMITS) -> tuple[Engine, FakePipeline]:
    """An engine whose calls take the times of a CPU, measured as at the server's start."""
    engine, pipeline, clock = make_engine(limits, seconds=on_a_cpu)
    engine.costs.adopt("m", WarmUp(limits.max_batch_size, 1000.0, clock).measure("m", pipeline))
    for calls in (pipeline.batches, pipeline.encoded, pipeline.decoded):
        calls.clear()
    return engine, pipeline


def sizes(pipeline: FakePipeline) -> list[int]:
    return [len(batch) for batch in pipeline.batches]


@pytest.mark.parametrize("known", [True, False], ids=["costs are measured", "costs are unknown"])
@pytest.mark.parametrize("clients", [1, 24])
def test_alike_requests_that_arrive_together_share_every_call(clients: int, known: bool) -> None:
    engine, pipeline = measured_engine() if known else make_engine(LIMITS)[:2]
    callers = [Caller(engine).submit(num_inference_steps=STEPS, client=f"client {number % clients}") for number in range(20)]
    run_out(engine)
    assert sizes(pipeline) == [8] * STEPS + [8] * STEPS + [4] * STEPS
    assert pipeline.encoded == pipeline.decoded == [8, 8, 4]
    assert all(caller.error is None for caller in callers)


@pytest.mark.parametrize("clients", [9, 16, 40])
@pytest.mark.parametrize("apart", [0, 1, 3], ids=lambda steps: f"first requests {steps} steps apart")
def test_clients_that_always_send_the_next_alike_request_fill_each_call(clients: int, apart: int) -> None:
    engine, pipeline = measured_engine()
    answers, most = 0, 4 * clients

    def send() -> None:
        def listen(event: Event) -> None:
            nonlocal answers
            if isinstance(event, Completed):
                answers += 1
                due.append(send)

        caller = Caller(engine)
        caller.events = _Heard(listen)
        caller.submit(num_inference_steps=STEPS)

    due: list[Callable[[], None]] = []
    for _ in range(clients):
        send()
        for _ in range(apart):
            engine.step()
    begun = len(pipeline.batches)
    while answers < most:
        sending, due = due, []
        for again in sending:
            again()
        engine.step()
    counted = Counter(sizes(pipeline)[begun:])
    assert counted[FULL] >= 0.99 * counted.total(), counted
    engine.close()


class _Heard(list[Event]):
    """The events of a caller, read as they arrive."""

    def __init__(self, listen: Callable[[Event], None]) -> None:
        super().__init__()
        self._listen = listen

    def append(self, event: Event) -> None:
        super().append(event)
        self._listen(event)


def test_requests_at_different_steps_share_full_calls_if_they_are_as_long() -> None:
    """A request that is nearly finished is not a short one: a few milliseconds for each of its last calls matter little."""
    engine, pipeline = measured_engine()
    for _ in range(12):
        Caller(engine).submit(num_inference_steps=STEPS)
        engine.step()
    begun = len(pipeline.batches)
    engine.step()
    engine.step()
    assert sizes(pipeline)[begun:] == [FULL, FULL]
    assert len({state.step for state in pipeline.batches[-1]}) > 4, "they are at different steps"
    engine.close()


def test_short_requests_join_at_once_while_alike_ones_wait() -> None:
    engine, pipeline = measured_engine()
    long = [Caller(engine).submit(num_inference_steps=STEPS) for _ in range(2 * FULL)]
    engine.step()
    short = Caller(engine).submit(num_inference_steps=2)
    for _ in range(3):
        engine.step()
    assert short.endings
    assert [bool(caller.events and isinstance(caller.events[0], Started)) for caller in long] == [True] * FULL + [False] * FULL
    assert pipeline.encoded == [FULL, 1]
    engine.close()


def test_requests_of_another_kind_are_admitted_past_alike_ones_that_wait() -> None:
    """Alike requests cannot keep the others from their turns, however many follow."""
    engine, pipeline = measured_engine()
    for _ in range(2 * FULL):
        Caller(engine).submit(num_inference_steps=STEPS)
    engine.step()
    other = Caller(engine).submit(num_inference_steps=STEPS, image=WIDE)
    longer = Caller(engine).submit(num_inference_steps=2 * STEPS)
    engine.step()
    engine.step()
    assert pipeline.encoded == [FULL, 1, 1]
    assert isinstance(other.events[0], Started)
    assert isinstance(longer.events[0], Started)
    engine.close()


def test_another_clients_request_does_not_wait_behind_alike_ones_of_one_client() -> None:
    engine, _ = measured_engine()
    for _ in range(2 * FULL):
        Caller(engine).submit(num_inference_steps=STEPS, client="many")
    engine.step()
    few = Caller(engine).submit(num_inference_steps=STEPS, client="few")
    for _ in range(STEPS + 1):
        engine.step()
    assert few.endings, "it took part in each call"
    engine.close()


def test_retry_delay_lasts_until_alike_requests_end() -> None:
    """The waiting ones are not admitted after the next step, though fewer than `max_active` are active."""
    limits = QueueLimits(max_batch_size=FULL, max_waiting=FULL)
    engine, _ = measured_engine(limits)
    for _ in range(FULL):
        Caller(engine).submit(num_inference_steps=STEPS)
    engine.step()
    for _ in range(FULL):
        Caller(engine).submit(num_inference_steps=STEPS)
    with pytest.raises(QueueFull) as refused:
        Caller(engine).submit(num_inference_steps=STEPS)
    assert refused.value.retry_after == pytest.approx((STEPS - 1) * on_a_cpu(FULL), rel=0.01)
    engine.close()


def test_active_requests_still_wait_for_few_encodings_between_two_steps() -> None:
    engine, pipeline = measured_engine(QueueLimits(max_batch_size=FULL, max_admitted=3))
    Caller(engine).submit(num_inference_steps=STEPS)
    engine.step()
    for _ in range(6):
        Caller(engine).submit(num_inference_steps=STEPS)
    engine.step()
    engine.step()
    assert pipeline.encoded == [1, 3, 3]
    engine.close()

"""Admission of the engine: limits on requests, on seconds of work and per client, and the retry delay of a refusal."""

from collections.abc import Callable

import pytest
from fakes import Caller, Clock, FakePipeline, make_engine, make_request, run_out
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Event
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.engine.warmup import WarmUp
from img2img_server.errors import ClientBusy, EngineStuck, ModelNotLoaded, QueueFull, ShuttingDown
from PIL import Image

CURVE = {1: 0.012, 2: 0.018, 4: 0.034, 8: 0.064, 16: 0.120}
"""Seconds of a call by rows: measured of the demo model on two cores."""


def measured_engine(
    limits: QueueLimits, seconds: Callable[[int], float] = lambda rows: 1.0
) -> tuple[Engine, FakePipeline, Clock]:
    """An engine with known costs, whose clock begins at 0."""
    engine, pipeline, clock = make_engine(limits, seconds=seconds)
    engine.costs.adopt("m", WarmUp(16, 1000.0, clock).measure("m", pipeline))
    clock.now = 0.0
    return engine, pipeline, clock


def check_room(engine: Engine, client: str = "") -> None:
    """Raises the error that a new request of `client` would get."""
    with engine.reserve(client):
        pass


def by_curve(rows: int) -> float:
    return CURVE[min(size for size in CURVE if size >= rows)]


def test_work_beyond_the_limit_is_refused_until_it_shrinks() -> None:
    engine, _, clock = measured_engine(QueueLimits(max_batch_size=1, max_waiting_seconds=10.0))
    for steps in (6, 8):
        Caller(engine).submit(num_inference_steps=steps)
    with pytest.raises(QueueFull) as refusal:
        Caller(engine).submit(num_inference_steps=1)
    assert refusal.value.retry_after == pytest.approx(14.0 - 10.0)
    clock_before = clock.now
    while clock.now < clock_before + refusal.value.retry_after:
        with pytest.raises(QueueFull):
            Caller(engine).submit(num_inference_steps=1)
        engine.step()
    last = Caller(engine).submit(num_inference_steps=1)
    run_out(engine)
    assert last.error is None, "what it was told was right to the step"


def test_idle_engine_accepts_a_request_above_the_work_limit() -> None:
    engine, _, _ = measured_engine(QueueLimits(max_waiting_seconds=10.0))
    caller = Caller(engine).submit(num_inference_steps=50)
    run_out(engine)
    assert caller.error is None


def test_unknown_costs_never_refuse() -> None:
    engine, _, _ = make_engine(QueueLimits(max_waiting_seconds=0.001))
    callers = [Caller(engine).submit(num_inference_steps=50) for _ in range(20)]
    assert engine.stats.work_seconds is None
    run_out(engine)
    assert [caller.error for caller in callers] == [None] * 20


@pytest.mark.parametrize(("requests", "most"), [(8, 32), (60, 32), (200, 32), (30, 2)])
def test_estimated_work_seconds_match_the_device_time(requests: int, most: int) -> None:
    """Calls that are shared are counted once, so a bound in seconds is one of the time that a caller waits."""
    engine, _, clock = measured_engine(QueueLimits(max_active=most, max_client_waiting=1000), by_curve)
    for number in range(requests):
        Caller(engine).submit(num_inference_steps=4 + number % 40, image=Image.new("RGB", (16, 16)), client=f"c{number % 3}")
    work = engine.stats.work_seconds
    run_out(engine, 100_000)
    assert work == pytest.approx(clock.now, rel=0.15)


def test_work_seconds_shrink_as_work_is_done() -> None:
    engine, _, clock = measured_engine(QueueLimits())
    Caller(engine).submit(num_inference_steps=10)
    seen = []
    while engine.step():
        seen.append((engine.stats.work_seconds, 10.0 - clock.now))
    assert [left for left, _ in seen] == [left for _, left in seen]
    assert engine.stats.work_seconds == 0.0


def test_queue_full_retry_delay_is_the_time_until_the_next_admission() -> None:
    engine, pipeline, clock = measured_engine(QueueLimits(max_active=2, max_waiting=3, max_batch_size=2))
    for _ in range(5):
        Caller(engine).submit(num_inference_steps=6)
        engine.step()
    begun, before = clock.now, len(pipeline.prepared)
    with pytest.raises(QueueFull) as refusal:
        Caller(engine).submit(num_inference_steps=50)
    while len(pipeline.prepared) == before:
        engine.step()
    assert clock.now - begun - 1.0 <= refusal.value.retry_after <= clock.now - begun
    Caller(engine).submit(num_inference_steps=1)
    engine.close()


def test_with_free_slots_the_retry_delay_is_one_step() -> None:
    engine, _, clock = measured_engine(QueueLimits(max_waiting=2, max_admitted=2))
    Caller(engine).submit(num_inference_steps=6)
    engine.step()
    for _ in range(2):
        Caller(engine).submit(num_inference_steps=6)
    with pytest.raises(QueueFull) as refusal:
        Caller(engine).submit()
    before = clock.now
    engine.step()
    assert refusal.value.retry_after == clock.now - before
    Caller(engine).submit()
    engine.close()


def test_retry_delay_has_a_minimum() -> None:
    engine, _, _ = measured_engine(QueueLimits(max_active=1, max_waiting=1), seconds=lambda rows: 1e-6)
    Caller(engine).submit()
    engine.step()
    Caller(engine).submit()
    with pytest.raises(QueueFull) as refusal:
        Caller(engine).submit()
    assert refusal.value.retry_after == 0.1
    engine.close()


def test_waiting_requests_per_client_are_limited() -> None:
    engine, _, _ = measured_engine(QueueLimits(max_client_waiting=3, max_batch_size=1))
    callers = [Caller(engine).submit(client="many") for _ in range(3)]
    with pytest.raises(ClientBusy) as refusal:
        Caller(engine).submit(client="many")
    assert refusal.value.retry_after == pytest.approx(4.0), "until its first is finished"
    callers += [Caller(engine).submit(client="few"), *(Caller(engine).submit() for _ in range(5))]
    while not callers[0].endings:
        engine.step()
    callers.append(Caller(engine).submit(client="many"))
    run_out(engine)
    assert [caller.error for caller in callers] == [None] * len(callers)


def test_last_queue_slots_are_reserved_for_clients_without_a_request() -> None:
    engine, _, _ = make_engine(QueueLimits(max_active=1, max_waiting=16))
    for _ in range(14):
        Caller(engine).submit(client="many")
    with pytest.raises(QueueFull):
        Caller(engine).submit(client="many")
    with engine.reserve("few") as place:
        engine.submit(make_request(client="few"), lambda event: None, place)
        with pytest.raises(QueueFull):
            Caller(engine).submit(client="few")
    Caller(engine).submit(client="other")
    with pytest.raises(QueueFull):
        Caller(engine).submit(client="one too many")
    run_out(engine)


def test_server_requests_do_not_count_as_a_client() -> None:
    engine, _, _ = measured_engine(QueueLimits(max_client_waiting=1, max_waiting_seconds=1.0))
    Caller(engine).submit(client="one", num_inference_steps=50)
    for _ in range(3):
        Caller(engine).submit(client="one", background=True)
    engine.close()


def test_arriving_requests_count_towards_the_limit() -> None:
    """Otherwise more images would be fetched and decoded than the queue has slots."""
    engine, _, _ = make_engine(QueueLimits(max_waiting=2))
    with engine.reserve() as place:
        assert engine.stats.arriving == 1
        with engine.reserve(), pytest.raises(QueueFull):
            check_room(engine)
        check_room(engine)
        Caller(engine).submit()
        with pytest.raises(QueueFull):
            Caller(engine).submit()
        engine.submit(make_request(), lambda event: None, place)
        assert (engine.stats.arriving, engine.stats.waiting) == (0, 2)
    run_out(engine)
    check_room(engine)


def test_request_counts_towards_its_client_until_the_response_is_read() -> None:
    engine, _, _ = make_engine(QueueLimits(max_client_waiting=2))
    ended: list[Event] = []
    with engine.reserve("slow") as place, engine.reserve("slow") as other:
        for held in (place, other):
            engine.submit(make_request(client="slow"), ended.append, held)
        run_out(engine)
        assert sum(isinstance(event, Completed) for event in ended) == 2
        with pytest.raises(ClientBusy):
            check_room(engine, "slow")
        check_room(engine, "another")
    check_room(engine, "slow")


def test_refused_request_releases_its_slot() -> None:
    engine, _, _ = measured_engine(QueueLimits(max_client_waiting=1))
    with pytest.raises(ModelNotLoaded), engine.reserve("a") as place:
        engine.submit(make_request(model="gone", client="a"), lambda event: None, place)
    check_room(engine, "a")
    assert engine.stats.arriving == 0


def test_cancelled_request_counts_until_it_is_removed() -> None:
    engine, _, _ = make_engine(QueueLimits(max_client_waiting=1))
    with engine.reserve("a") as place:
        ticket = engine.submit(make_request(client="a"), lambda event: None, place).ticket
    ticket.cancel()
    with pytest.raises(ClientBusy):
        check_room(engine, "a")
    engine.step()
    check_room(engine, "a")


def test_stopped_engine_refuses_requests() -> None:
    engine, _, _ = make_engine()
    engine.close()
    with pytest.raises(ShuttingDown):
        check_room(engine)
    lost, _, _ = make_engine()
    lost.abandon(EngineStuck("lost"))
    with pytest.raises(EngineStuck), lost.reserve("a"):
        pass

"""The engine's promises, on a fake pipeline with a manual clock, stepped by hand."""

import threading

import pytest
from fakes import Caller, FakePipeline, make_engine, make_request, run_out
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Event, Started
from img2img_server.engine.scheduler import Limits
from img2img_server.errors import DeadlineExpired, ModelFailed, QueueFull, RequestCancelled, ShuttingDown
from PIL import Image

WIDE = Image.new("RGB", (16, 8))


def test_a_request_is_started_stepped_and_completed() -> None:
    engine, pipeline, _ = make_engine()
    caller = Caller(engine).submit(num_inference_steps=10, strength=0.5, seeds=(1, 2, 3))
    run_out(engine)
    assert caller.events[0] == Started(5)
    assert caller.steps == [1, 2, 3, 4, 5]
    (ending,) = caller.endings
    assert isinstance(ending, Completed)
    assert len(ending.images) == 3
    assert caller.events[-1] is ending
    assert len(pipeline.released) == 1


def test_timings_are_of_the_engines_clock() -> None:
    engine, _, clock = make_engine()
    caller = Caller(engine).submit(num_inference_steps=3)
    clock.now = 5.0
    run_out(engine)
    (ending,) = caller.endings
    assert isinstance(ending, Completed)
    assert (ending.timings.queue, ending.timings.denoise) == (5.0, 3.0)


def test_requests_of_different_steps_share_calls_and_join_midway() -> None:
    engine, pipeline, _ = make_engine()
    long = Caller(engine).submit(num_inference_steps=6)
    engine.step()
    engine.step()
    short = Caller(engine).submit(num_inference_steps=2, strength=1.0, guidance_scale=1.0)
    run_out(engine)
    assert [len(batch) for batch in pipeline.batches] == [1, 1, 2, 2, 1, 1]
    assert long.steps == [1, 2, 3, 4, 5, 6]
    assert short.steps == [1, 2]


def test_a_batch_is_bounded_by_pictures_and_rotates_beyond_that() -> None:
    engine, pipeline, _ = make_engine(Limits(max_batch_size=4))
    callers = [Caller(engine).submit(num_inference_steps=8, seeds=(0, 1)) for _ in range(3)]
    while len(pipeline.prepared) < 3:
        engine.step()
    before = [len(caller.steps) for caller in callers]
    while not any(caller.endings for caller in callers):
        engine.step()
        since = [len(caller.steps) - start for caller, start in zip(callers, before, strict=True)]
        assert max(since) - min(since) <= 1, "three share two places, in turn"
    run_out(engine)
    assert max(sum(state.rows for state in batch) for batch in pipeline.batches) == 4
    assert all(caller.steps == list(range(1, 9)) for caller in callers)


def test_a_request_larger_than_the_batch_runs_alone() -> None:
    engine, pipeline, _ = make_engine(Limits(max_batch_size=2))
    caller = Caller(engine).submit(num_inference_steps=1, seeds=(1, 2, 3))
    run_out(engine)
    assert caller.error is None
    assert [len(batch) for batch in pipeline.batches] == [1]


def test_shapes_take_turns() -> None:
    engine, pipeline, _ = make_engine()
    Caller(engine).submit(num_inference_steps=50)
    engine.step()
    short = Caller(engine).submit(num_inference_steps=4, image=WIDE)
    steps = 0
    while not short.endings:
        engine.step()
        steps += 1
    assert steps <= 2 * 4 + 1
    assert {state.shape for batch in pipeline.batches for state in batch} == {(8, 8), (16, 8)}


def test_a_pipelines_own_bound_on_rows_holds() -> None:
    engine, pipeline, _ = make_engine(max_rows=1)
    callers = [Caller(engine).submit(num_inference_steps=3) for _ in range(3)]
    run_out(engine)
    assert {len(batch) for batch in pipeline.batches} == {1}
    assert all(caller.error is None for caller in callers)


def test_waiting_requests_are_admitted_by_deadline_then_arrival() -> None:
    engine, pipeline, _ = make_engine(Limits(max_active=1))
    for prompt, deadline in (("first", None), ("second", None), ("late", 90.0), ("soon", 50.0)):
        Caller(engine).submit(num_inference_steps=1, prompt=prompt, deadline=deadline)
    run_out(engine)
    assert [state.request.prompt for state in pipeline.prepared] == ["soon", "late", "first", "second"]


def test_a_cancelled_request_leaves_at_the_next_step_and_is_released() -> None:
    engine, pipeline, _ = make_engine()
    leaving, staying = Caller(engine).submit(num_inference_steps=50), Caller(engine).submit(num_inference_steps=5)
    engine.step()
    engine.step()
    assert leaving.ticket is not None
    leaving.ticket.cancel()
    engine.step()
    assert isinstance(leaving.error, RequestCancelled)
    assert [state.request.num_inference_steps for state in pipeline.released] == [50]
    run_out(engine)
    assert staying.error is None


def test_a_request_cancelled_while_it_waits_is_never_prepared() -> None:
    engine, pipeline, _ = make_engine()
    caller = Caller(engine).submit()
    assert caller.ticket is not None
    caller.ticket.cancel()
    run_out(engine)
    assert isinstance(caller.error, RequestCancelled)
    assert pipeline.prepared == []


def test_an_expired_request_leaves_at_the_next_step() -> None:
    engine, _, clock = make_engine()
    caller = Caller(engine).submit(num_inference_steps=50, deadline=3.0)
    run_out(engine)
    assert isinstance(caller.error, DeadlineExpired)
    assert clock.now == 3.0


@pytest.mark.parametrize("where", ["prepare", "denoise", "advance", "finish"])
def test_a_failing_model_ends_its_requests_and_nothing_else(where: str) -> None:
    engine, pipeline, _ = make_engine()
    failing = Caller(engine).submit(prompt=f"fail {where}", image=WIDE)
    others = [Caller(engine).submit() for _ in range(3)]
    run_out(engine)
    assert isinstance(failing.error, ModelFailed)
    assert "told to fail" not in str(failing.error), "the model's own words stay in the log"
    assert [other.error for other in others] == [None] * 3
    assert len(pipeline.released) == len(pipeline.prepared)


def test_a_failing_release_does_not_change_the_ending() -> None:
    engine, _, _ = make_engine()
    caller = Caller(engine).submit(prompt="fail release")
    run_out(engine)
    assert caller.error is None


def test_a_full_queue_refuses_at_once_and_says_when_to_retry() -> None:
    engine, _, _ = make_engine(Limits(max_active=1, max_waiting=2))
    Caller(engine).submit(num_inference_steps=8)
    engine.step()
    callers = [Caller(engine).submit() for _ in range(2)]
    with pytest.raises(QueueFull) as refusal:
        Caller(engine).submit()
    assert refusal.value.retry_after == 7 + 3 * 4, "what is left of the first, two waiting, and the new one itself"
    run_out(engine)
    assert all(caller.error is None for caller in callers)


def test_position_and_estimate_are_told_on_arrival() -> None:
    engine, _, _ = make_engine()
    first = engine.submit(make_request(), lambda event: None)
    assert (first.position, first.eta) == (0, None)
    second = engine.submit(make_request(), lambda event: None)
    assert second.position == 1
    run_out(engine)
    assert engine.submit(make_request(), lambda event: None).eta is not None


def test_closing_ends_what_is_left() -> None:
    engine, pipeline, _ = make_engine()
    callers = [Caller(engine).submit() for _ in range(3)]
    engine.step()
    engine.close()
    assert all(isinstance(caller.error, ShuttingDown) for caller in callers)
    assert len(pipeline.released) == len(pipeline.prepared)
    with pytest.raises(ShuttingDown):
        Caller(engine).submit()


def test_a_draining_engine_finishes_what_it_has() -> None:
    engine = Engine({"m": FakePipeline()})
    done = threading.Event()
    caller = Caller(engine)
    engine.start()

    def listen(event: Event) -> None:
        caller.events.append(event)
        if isinstance(event, Completed):
            done.set()

    engine.submit(make_request(), listen)
    assert engine.drain(timeout=30)
    assert done.wait(30)
    with pytest.raises(ShuttingDown):
        Caller(engine).submit()
    engine.close()
    assert caller.error is None


def test_draining_gives_up_after_its_time() -> None:
    engine, _, _ = make_engine()
    Caller(engine).submit()
    assert not engine.drain(timeout=0)
    engine.close()


def test_one_thread_runs_every_model_call() -> None:
    pipeline = FakePipeline()
    threads = set()
    pipeline.before_call = lambda: threads.add(threading.current_thread().name)
    engine = Engine({"m": pipeline})
    engine.start()
    submitters = [threading.Thread(target=lambda: Caller(engine).submit()) for _ in range(8)]
    for thread in submitters:
        thread.start()
    for thread in submitters:
        thread.join()
    assert engine.drain(timeout=30)
    engine.close()
    assert threads == {"img2img-engine"}

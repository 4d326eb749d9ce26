"""The engine's guarantees, on a fake pipeline with a manual clock; tests make its steps."""

import threading
from collections.abc import Callable

import pytest
from fakes import Caller, FakePipeline, make_engine, make_request, run_out
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Event, ImagePromptUse, Progress, Queued, Started
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.engine.warmup import WarmUp
from img2img_server.errors import DeadlineExpired, DeadlineUnmeetable, ModelFailed, QueueFull, RequestCancelled, ShuttingDown
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


def test_timings_use_the_engines_clock() -> None:
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


def test_batch_size_is_limited_in_rows() -> None:
    engine, pipeline, _ = make_engine(QueueLimits(max_batch_size=4))
    callers = [Caller(engine).submit(num_inference_steps=8, seeds=(0, 1)) for _ in range(3)]
    run_out(engine)
    assert max(sum(len(state.request.seeds) for state in batch) for batch in pipeline.batches) == 4
    assert all(caller.steps == list(range(1, 9)) for caller in callers)


def test_no_request_starves() -> None:
    """A long request of another shape progresses while short ones keep arriving."""
    engine, pipeline, _ = make_engine(QueueLimits(max_batch_size=1))
    long = Caller(engine).submit(num_inference_steps=20, image=WIDE)
    passed = 0
    while not long.endings:
        if len(pipeline.prepared) - len(pipeline.decoded) < 4:
            Caller(engine).submit(num_inference_steps=2)
        before = len(long.steps)
        engine.step()
        passed = 0 if len(long.steps) > before else passed + 1
        assert passed <= 8 + 2 * 5
    engine.close()


def test_short_request_does_not_join_batches_that_would_slow_it_down() -> None:
    """If larger calls take proportionally longer, the request does not share calls with requests that are not urgent."""
    engine, pipeline, clock = make_engine(seconds=lambda rows: 1.0 * rows)
    engine.costs.adopt("m", WarmUp(16, 1000.0, clock).measure("m", pipeline))
    for _ in range(4):
        Caller(engine).submit(num_inference_steps=50)
    for _ in range(20):
        engine.step()
    begun = clock.now
    short = Caller(engine).submit(num_inference_steps=4)
    while not short.endings:
        engine.step()
    assert clock.now - begun <= 2 * 4
    engine.close()


def test_all_requests_share_a_call_if_batching_costs_nothing() -> None:
    engine, pipeline, _ = make_engine()
    for steps in (50, 50, 4, 30):
        Caller(engine).submit(num_inference_steps=steps)
    engine.step()
    assert len(pipeline.batches[-1]) == 4
    run_out(engine)
    assert len(pipeline.batches) == 50


def test_requests_that_arrive_together_are_encoded_together() -> None:
    engine, pipeline, _ = make_engine(QueueLimits(max_admitted=3))
    for steps in (2, 2, 2, 3):
        Caller(engine).submit(num_inference_steps=steps)
    run_out(engine)
    assert pipeline.encoded == [3, 1]
    assert pipeline.decoded == [3, 1]


def test_request_larger_than_the_batch_size_runs_alone() -> None:
    engine, pipeline, _ = make_engine(QueueLimits(max_batch_size=2))
    caller = Caller(engine).submit(num_inference_steps=1, seeds=(1, 2, 3))
    run_out(engine)
    assert caller.error is None
    assert [len(batch) for batch in pipeline.batches] == [1]


def test_requests_of_different_shapes_alternate() -> None:
    engine, pipeline, _ = make_engine()
    Caller(engine).submit(num_inference_steps=50)
    engine.step()
    short = Caller(engine).submit(num_inference_steps=4, image=WIDE)
    steps = 0
    while not short.endings:
        engine.step()
        steps += 1
    assert steps <= 2 * 4 + 1
    assert {state.request.image.size for batch in pipeline.batches for state in batch} == {(8, 8), (16, 8)}


def test_batches_respect_the_pipelines_own_row_limit() -> None:
    engine, pipeline, _ = make_engine(max_rows=1)
    callers = [Caller(engine).submit(num_inference_steps=3) for _ in range(3)]
    run_out(engine)
    assert {len(batch) for batch in pipeline.batches} == {1}
    assert all(caller.error is None for caller in callers)


def test_waiting_requests_are_admitted_by_deadline_then_arrival() -> None:
    engine, pipeline, _ = make_engine(QueueLimits(max_active=1))
    for prompt, deadline in (("first", None), ("second", None), ("late", 90.0), ("soon", 50.0)):
        Caller(engine).submit(num_inference_steps=1, prompt=prompt, deadline=deadline)
    run_out(engine)
    assert [state.request.prompt for state in pipeline.prepared] == ["soon", "late", "first", "second"]


def test_cancelled_request_is_released_at_the_next_step() -> None:
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


def test_request_cancelled_while_waiting_is_never_prepared() -> None:
    engine, pipeline, _ = make_engine()
    caller = Caller(engine).submit()
    assert caller.ticket is not None
    caller.ticket.cancel()
    run_out(engine)
    assert isinstance(caller.error, RequestCancelled)
    assert pipeline.prepared == []


def test_expired_request_is_removed_at_the_next_step() -> None:
    engine, _, clock = make_engine()
    caller = Caller(engine).submit(num_inference_steps=50, deadline=3.0)
    run_out(engine)
    assert isinstance(caller.error, DeadlineExpired)
    assert clock.now == 3.0


@pytest.mark.parametrize("where", ["prepare", "denoise", "advance", "finish"])
def test_failing_request_does_not_fail_others_in_its_batch(where: str) -> None:
    engine, pipeline, _ = make_engine()
    failing = Caller(engine).submit(prompt=f"fail {where}")
    others = [Caller(engine).submit() for _ in range(3)]
    run_out(engine)
    assert isinstance(failing.error, ModelFailed)
    assert "told to fail" not in str(failing.error), "the model's own words stay in the log"
    assert [other.error for other in others] == [None] * 3
    assert len(pipeline.released) == len(pipeline.prepared)


def test_failing_preview_is_omitted() -> None:
    engine, _, _ = make_engine()
    caller = Caller(engine).submit(prompt="fail preview", preview_interval=1)
    run_out(engine)
    assert caller.error is None
    assert caller.steps == [1, 2, 3, 4]


def test_failing_release_does_not_fail_the_request() -> None:
    engine, _, _ = make_engine()
    caller = Caller(engine).submit(prompt="fail release")
    run_out(engine)
    assert caller.error is None


@pytest.mark.parametrize("where", ["complete", "prepare", "advance", "finish"])
def test_internal_error_fails_all_requests_but_the_engine_continues(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that were just ending fail too, and all states are released."""
    engine, pipeline, _ = make_engine(QueueLimits(max_active=3))
    callers = [Caller(engine).submit(num_inference_steps=2) for _ in range(4)]
    engine.step()
    assert callers[0].ticket is not None
    callers[0].ticket.cancel()

    def bug(*values: object) -> None:
        monkeypatch.undo()
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine._executor, where, bug)
    engine.start()
    assert engine.wait_until_idle("m")
    later = Caller(engine).submit()
    assert engine.drain(60)
    engine.close()
    assert [type(ending) for ending in later.endings] == [Completed]
    assert all(len(caller.endings) == 1 for caller in callers)
    assert {type(caller.error) for caller in callers} <= {ModelFailed, RequestCancelled}
    assert set(pipeline.released) == set(pipeline.prepared)


def test_queue_full_is_immediate_and_has_a_retry_delay() -> None:
    engine, _, _ = make_engine(QueueLimits(max_active=1, max_waiting=2))
    Caller(engine).submit(num_inference_steps=8)
    engine.step()
    callers = [Caller(engine).submit() for _ in range(2)]
    with pytest.raises(QueueFull) as refusal:
        Caller(engine).submit()
    assert refusal.value.retry_after == 7.0, "until the one in progress is done, and the first of those who wait begins"
    run_out(engine)
    assert all(caller.error is None for caller in callers)


def test_queued_event_has_position_and_eta() -> None:
    engine, _, _ = make_engine()
    first = engine.submit(make_request(), lambda event: None)
    assert (first.position, first.eta) == (0, None)
    second = engine.submit(make_request(), lambda event: None)
    assert second.position == 1
    run_out(engine)
    assert engine.submit(make_request(num_inference_steps=6), lambda event: None).eta == 6.0


def test_eta_is_accurate_without_new_requests() -> None:
    curve = {1: 1.0, 2: 1.2, 4: 1.8, 8: 3.0}
    engine, _, clock = make_engine(seconds=lambda rows: curve[min(size for size in curve if size >= rows)], codec_seconds=0.5)
    for rows in (1, 2, 4, 8):
        Caller(engine).submit(num_inference_steps=1, seeds=tuple(range(rows)))
        run_out(engine)
    told: list[tuple[Caller, float, float]] = []
    for steps, image in ((40, WIDE), (10, WIDE), (4, None), (25, None), (25, None)):
        caller = Caller(engine)
        settings = {} if image is None else {"image": image}
        accepted = engine.submit(make_request(num_inference_steps=steps, **settings), caller.events.append)
        assert accepted.eta is not None
        told.append((caller, clock.now, accepted.eta))
        for _ in range(3):
            engine.step()
    # The last to come knows all the others.
    caller, begun, eta = told[-1]
    while not caller.endings:
        engine.step()
    assert eta == pytest.approx(clock.now - begun, rel=0.2)
    engine.close()


def test_estimates_are_corrected_by_their_past_errors() -> None:
    """Two short requests come for each step of a long one: after a few, its estimate has them in it."""
    engine, _, clock = make_engine(QueueLimits(max_batch_size=1))
    wrong = []
    for _ in range(12):
        begun, caller = clock.now, Caller(engine)
        eta = engine.submit(make_request(num_inference_steps=8, image=WIDE), caller.events.append).eta
        while not caller.endings:
            Caller(engine).submit(num_inference_steps=1)
            engine.step()
            engine.step()
        if eta is not None:
            wrong.append(abs(eta - (clock.now - begun)) / (clock.now - begun))
        run_out(engine)
    assert wrong[-1] < 0.2 < wrong[0]


def test_waiting_requests_get_queue_position_updates() -> None:
    engine, _, _ = make_engine(QueueLimits(max_active=1))
    for _ in range(2):
        Caller(engine).submit(num_inference_steps=3)
    last = Caller(engine).submit(num_inference_steps=3)
    run_out(engine)
    assert [event.position for event in last.events if isinstance(event, Queued)] == [1, 0]
    assert isinstance(last.events[-1], Completed)


def test_progress_has_the_remaining_time() -> None:
    engine, _, _ = make_engine()
    Caller(engine).submit(num_inference_steps=1)
    run_out(engine)
    caller = Caller(engine).submit(num_inference_steps=4)
    run_out(engine)
    assert [event.eta for event in caller.events if isinstance(event, Progress)] == [3.0, 2.0, 1.0, 0.0]


def test_active_requests_wait_for_the_images_of_one_request_with_image_prompts_a_step() -> None:
    """Requests without image prompts are admitted with it. If no request is active, all are admitted together."""
    engine, pipeline, _ = make_engine(QueueLimits(max_admitted=4))
    prompts = (ImagePromptUse("a", ()),)
    running = Caller(engine).submit(num_inference_steps=8)
    engine.step()
    callers = [Caller(engine).submit(image_prompts=own, num_inference_steps=8) for own in (prompts, (), prompts, prompts)]
    begun = []
    for _ in range(3):
        engine.step()
        begun.append([any(isinstance(event, Started) for event in caller.events) for caller in callers])
    assert begun == [[True, True, False, False], [True, True, True, False], [True] * 4]
    assert running.steps == [1, 2, 3, 4]
    run_out(engine)
    pipeline.prepared.clear()
    for _ in range(3):
        Caller(engine).submit(image_prompts=prompts)
    engine.step()
    assert len(pipeline.prepared) == 3


def test_encoding_image_prompts_does_not_lengthen_the_forecast_of_others() -> None:
    """Each request with some is encoded in a call of its own, since the watchdog bounds a call."""
    engine, pipeline, clock = make_engine(codec_seconds=1.0)

    def encode() -> None:
        clock.now += 50.0

    Caller(engine).submit(num_inference_steps=1)
    run_out(engine)
    pipeline.before["prepare"] = encode
    callers = [Caller(engine).submit(image_prompts=(ImagePromptUse("a", ()),)) for _ in range(2)]
    run_out(engine)
    assert pipeline.encoded == [1, 1, 1]
    assert all(caller.error is None for caller in callers)
    assert engine.costs.seconds("prepare", ("m", (8, 8)), 64, 1) == 1.0


def test_unmeetable_deadline_is_refused_with_the_estimate() -> None:
    engine, pipeline, clock = make_engine()
    Caller(engine).submit(num_inference_steps=1)
    run_out(engine)
    with pytest.raises(DeadlineUnmeetable) as refusal:
        Caller(engine).submit(num_inference_steps=20, deadline=clock.now + 10)
    assert refusal.value.estimate == 20.0
    assert len(pipeline.prepared) == 1, "nothing was computed for it"
    caller = Caller(engine).submit(num_inference_steps=20, deadline=clock.now + 21)
    run_out(engine)
    assert caller.error is None


def test_urgent_deadline_precedes_shorter_requests() -> None:
    engine, _, clock = make_engine(QueueLimits(max_batch_size=1))
    Caller(engine).submit(num_inference_steps=1)
    run_out(engine)
    pressed = Caller(engine).submit(num_inference_steps=20, deadline=clock.now + 30)
    others = [Caller(engine).submit(num_inference_steps=10, image=WIDE) for _ in range(5)]
    run_out(engine)
    assert [caller.error for caller in (pressed, *others)] == [None] * 6


def test_previews_are_sent_at_the_requested_steps() -> None:
    engine, pipeline, _ = make_engine()
    plain = Caller(engine).submit(num_inference_steps=6)
    curious = Caller(engine).submit(num_inference_steps=6, preview_interval=2)
    run_out(engine)
    assert [event.preview is not None for event in curious.events if isinstance(event, Progress)] == [
        False, True, False, True, False, False,
    ], "the image itself reports the last step"  # fmt: skip
    assert not any(event.preview for event in plain.events if isinstance(event, Progress))
    assert {state.request.preview_interval for state in pipeline.previewed} == {2}


def test_closing_fails_the_remaining_requests() -> None:
    engine, pipeline, _ = make_engine()
    callers = [Caller(engine).submit() for _ in range(3)]
    engine.step()
    engine.close()
    assert all(isinstance(caller.error, ShuttingDown) for caller in callers)
    assert len(pipeline.released) == len(pipeline.prepared)
    with pytest.raises(ShuttingDown):
        Caller(engine).submit()


def test_draining_engine_finishes_its_requests() -> None:
    engine = Engine({"m": FakePipeline()})
    done = threading.Event()
    caller = Caller(engine)
    engine.start()

    def listen(event: Event) -> None:
        caller.events.append(event)
        if isinstance(event, Completed):
            done.set()

    engine.submit(make_request(), listen)
    assert engine.drain(timeout=120)
    assert done.wait(120)
    with pytest.raises(ShuttingDown):
        Caller(engine).submit()
    engine.close()
    assert caller.error is None


def test_drain_stops_waiting_at_its_timeout() -> None:
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
    assert engine.drain(timeout=120)
    engine.close()
    assert threads == {"img2img-engine"}


def test_call_runs_work_on_the_engines_thread() -> None:
    """Recordings belong to the thread that made them."""
    engine = Engine({"m": FakePipeline()})
    name = engine.call("m", lambda: threading.current_thread().name)
    assert name == "img2img-engine"
    with pytest.raises(ZeroDivisionError):
        engine.call("m", lambda: 1 // 0)
    engine.start()
    first = engine.call("m", threading.get_ident)
    caller = Caller(engine).submit()
    assert engine.call("m", threading.get_ident) == first
    assert engine.drain(timeout=120)
    assert caller.error is None
    engine.close()
    with pytest.raises(ShuttingDown):
        engine.call("m", lambda: None)


@pytest.mark.parametrize("stop", [lambda engine: engine.close(), lambda engine: engine.abandon(ModelFailed("stuck"))])
def test_waiting_work_is_dropped_if_the_engine_stops(stop: Callable[[Engine], None]) -> None:
    engine, begun, gate = Engine({"m": FakePipeline()}), threading.Event(), threading.Event()
    outcomes: list[object] = []

    def call(work: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            try:
                outcomes.append(engine.call("m", work))
            except ShuttingDown as error:
                outcomes.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    first = call(lambda: _wait(begun, gate))
    assert begun.wait(120)
    second = call(lambda: outcomes.append("done too late"))
    with engine._changed:
        assert engine._changed.wait_for(lambda: bool(engine._tasks), 120)
    stopping = threading.Thread(target=lambda: stop(engine))
    stopping.start()
    with engine._changed:
        assert engine._changed.wait_for(lambda: engine._stopping, 120)
    gate.set()
    for thread in (first, second, stopping):
        thread.join(120)
    assert sum(isinstance(outcome, ShuttingDown) for outcome in outcomes) == 1
    assert "done too late" not in outcomes


def test_restarted_thread_takes_over_from_a_stuck_one() -> None:
    engine, begun, gate = Engine({"m": FakePipeline()}), threading.Event(), threading.Event()
    stuck = threading.Thread(target=lambda: engine.call("m", lambda: _wait(begun, gate)))
    stuck.start()
    assert begun.wait(120)
    assert engine.current_call is not None
    engine.restart_thread()
    assert engine.current_call is None, "the watchdog would end the server for it"
    caller = Caller(engine).submit()
    assert engine.drain(timeout=120)
    assert caller.error is None
    gate.set()
    stuck.join(120)
    assert engine.call("m", lambda: "still served") == "still served"
    engine.close()


def _wait(begun: threading.Event, gate: threading.Event) -> None:
    begun.set()
    assert gate.wait(120)

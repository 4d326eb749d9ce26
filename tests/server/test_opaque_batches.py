"""Shared calls of opaque pipelines: requests that lag, are cancelled, fail or exceed memory, on a pipeline without a model."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fake_diffusers import FakeDiffusers
from fakes import Caller, make_request, run_out
from img2img_server.engine.costs import Costs
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Request, run_alone
from img2img_server.engine.warmup import WarmUp
from img2img_server.errors import ModelFailed, OutOfMemory, RequestCancelled
from img2img_server.runtime.opaque.batching_rules import RULES, Rule
from img2img_server.runtime.opaque.pipeline import OpaquePipeline
from PIL import Image


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fake is a class that may share; afterwards no thread of a call is left."""
    monkeypatch.setitem(RULES, "FakeDiffusers", Rule())
    yield
    assert [thread for thread in threading.enumerate() if thread.name == "img2img-pipeline"] == []


def whole(room: int | None = None) -> tuple[OpaquePipeline, FakeDiffusers]:
    pipe = FakeDiffusers(room)
    return OpaquePipeline(pipe, "fake:cpu", threads=1), pipe


def request(prompt: str, **settings: Any) -> Request:
    return make_request(**{"prompt": prompt, "seeds": (len(prompt),), "guidance_scale": 1.0, **settings})


def serve(pipeline: OpaquePipeline, requests: list[Request]) -> list[Caller]:
    engine = Engine({"m": pipeline})
    callers = [Caller(engine) for _ in requests]
    for caller, item in zip(callers, requests, strict=True):
        engine.submit(item, caller.events.append)
    run_out(engine)
    return callers


def colours(caller: Caller) -> list[Any]:
    (ending,) = caller.endings
    assert isinstance(ending, Completed)
    return [image.getpixel((0, 0)) for image in ending.images]


def alone(*requests: Request) -> list[list[Any]]:
    return [[image.getpixel((0, 0)) for image in run_alone(whole()[0], item)] for item in requests]


def test_only_equal_settings_share_a_call() -> None:
    others: list[dict[str, Any]] = [
        {"num_inference_steps": 5},
        {"strength": 0.9},
        {"guidance_scale": 3.0},
        {"image": Image.new("RGB", (16, 8))},
    ]
    requests = [request("one", seeds=(1, 2)), request("two"), *(request("other", **settings) for settings in others)]
    pipeline, pipe = whole()
    states = pipeline.prepare(requests)
    while any(state.step < state.step_count for state in states):
        pipeline.advance(states, pipeline.denoise(states))
    assert pipe.calls == [["one", "one", "two"], ["other"], ["other"], ["other"], ["other"]]
    drawn = [[image.getpixel((0, 0)) for image in images] for images in pipeline.finish(states)]
    assert drawn == alone(*requests)


def test_plans_count_rows_and_group_equal_settings() -> None:
    pipeline, _ = whole()
    plans = [pipeline.plan(request("a", seeds=(1, 2, 3), guidance_scale=scale)) for scale in (1.0, 7.5, 7.5)]
    assert [(plan.rows, plan.step_count) for plan in plans] == [(3, 4), (6, 4), (6, 4)]
    assert plans[0].shape != plans[1].shape == plans[2].shape
    shapes = {pipeline.plan(request("a", strength=index / 1000)).shape for index in range(100, 1000)}
    assert len(shapes) < 20, "what is kept for each shape must not grow with what callers may ask"


def test_rows_per_call_are_limited() -> None:
    pipeline, pipe = whole()
    many = request("many", seeds=tuple(range(20)))
    assert (pipeline.plan(many).rows, pipeline.plan(many).step_count) == (16, 8)
    callers = serve(pipeline, [many, *(request("few", seeds=(1, 2, 3, 4, 5, 6)) for _ in range(3))])
    assert max(map(len, pipe.calls)) <= 16
    assert [len(colours(caller)) for caller in callers] == [20, 6, 6, 6]
    assert callers[0].steps == [1, 2, 3, 4, 5, 6, 7, 8]


def test_request_that_lags_behind_catches_up_without_computing() -> None:
    pipeline, pipe = whole()
    first, second = pipeline.prepare([request("a"), request("bb")])
    for _ in range(3):
        pipeline.advance([first], pipeline.denoise([first]))
    assert (first.step, second.step, pipe.steps) == (3, 0, 3)
    pipeline.denoise([second])
    pipeline.denoise([second])
    assert pipe.steps == 3, "asked again, nothing is computed twice"
    pipeline.advance([second], [None])
    assert second.step == 3
    while first.step < first.step_count or second.step < second.step_count:
        pipeline.advance([first, second], pipeline.denoise([first, second]))
    assert pipe.steps == 4
    assert [len(images) for images in pipeline.finish([second, first])] == [1, 1]
    pipeline.release(first)
    pipeline.release(second)


def test_opaque_pipeline_is_not_measured_in_warm_up() -> None:
    """Repeated steps are not computed again, so timing them would measure nothing."""
    pipeline, pipe = whole()
    costs = Costs()
    costs.adopt("m", WarmUp(8, 60.0).measure("m", pipeline))
    assert pipe.calls == []
    assert costs.describe("m", 8) == []


def test_cancelled_requests_do_not_stop_the_shared_call() -> None:
    pipeline, pipe = whole()
    engine = Engine({"m": pipeline})
    callers = [Caller(engine).submit(prompt="a", num_inference_steps=20, seeds=(seed,)) for seed in range(3)]
    while not callers[0].steps:
        engine.step()
    for caller in callers[:2]:
        assert caller.ticket is not None
        caller.ticket.cancel()
    run_out(engine)
    assert [type(caller.error) for caller in callers] == [RequestCancelled, RequestCancelled, type(None)]
    assert (len(pipe.calls), pipe.unwound) == (1, 0)


def test_call_is_unwound_once_all_its_requests_are_cancelled() -> None:
    pipeline, pipe = whole()
    engine = Engine({"m": pipeline})
    callers = [Caller(engine).submit(num_inference_steps=20) for _ in range(2)]
    while not callers[0].steps:
        engine.step()
    for caller in callers:
        assert caller.ticket is not None
        caller.ticket.cancel()
    run_out(engine)
    assert pipe.unwound == 1
    assert pipe.steps < 5


def test_failed_batch_is_rerun_and_only_failing_requests_fail() -> None:
    requests = [request("a"), request("fail"), request("ccc")]
    callers = serve(whole()[0], requests)
    assert [type(caller.error) for caller in callers] == [type(None), ModelFailed, type(None)]
    assert [colours(callers[0]), colours(callers[2])] == alone(requests[0], requests[2])
    assert callers[0].steps == sorted(set(callers[0].steps)), "repeated steps are not reported again"


def test_request_alone_in_its_call_is_not_affected_by_a_failing_one() -> None:
    pipeline, _ = whole()
    requests = [request("a"), request("fail")]
    good, bad = pipeline.prepare(requests)
    while good.step < good.step_count:
        pipeline.advance([good], pipeline.denoise([good]))
    assert [[image.getpixel((0, 0)) for image in pipeline.finish([good])[0]]] == alone(requests[0])
    pipeline.advance([bad], pipeline.denoise([bad]))
    with pytest.raises(RuntimeError, match="told to fail"):
        pipeline.denoise([bad])


def test_calls_that_exceed_memory_are_split_and_the_smaller_size_is_kept() -> None:
    pipeline, pipe = whole(room=2)
    requests = [request("a" * length) for length in (1, 2, 3, 4)]
    assert list(map(colours, serve(pipeline, requests))) == alone(*requests)
    pipe.calls.clear()
    serve(pipeline, requests)
    assert pipe.calls, "it goes on"
    assert max(map(len, pipe.calls)) <= 2


def test_images_of_one_request_are_generated_one_by_one_if_memory_is_short() -> None:
    pipeline, _ = whole(room=1)
    many = request("a", seeds=(1, 2, 3))
    (caller,) = serve(pipeline, [many])
    assert [colours(caller)] == alone(many)
    assert caller.steps == sorted(set(caller.steps))


def test_request_too_large_even_alone_gets_an_error() -> None:
    (caller,) = serve(whole(room=0)[0], [request("a", seeds=(1, 2))])
    assert isinstance(caller.error, OutOfMemory)


def test_unknown_pipeline_classes_generate_one_image_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RULES, "FakeDiffusers")
    pipeline, pipe = whole()
    assert pipeline.max_rows == 1
    requests = [request("a", seeds=(1, 2)), request("bb")]
    callers = serve(pipeline, requests)
    assert list(map(colours, callers)) == alone(*requests)
    assert sorted(pipe.calls) == [["a"], ["a"], ["bb"]]
    assert callers[0].steps == [1, 2, 3, 4, 5, 6, 7, 8]

"""Promotion: users are served throughout, and another engine takes over only when it is built, right and faster."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from fake_candidate import ENGINE, FakeCandidate, WatchedStore
from fakes import Caller, Clock, FakePipeline, make_request
from grpc_health.v1 import health_pb2, health_pb2_grpc
from img2img_client import Client, ModelNotFound
from img2img_server.engine.engine import Engine
from img2img_server.engine.interface import Span
from img2img_server.errors import BundleError, ModelNotLoaded
from img2img_server.models.promotion import Promotion
from img2img_server.models.registry import EngineState
from PIL import Image
from running import running

IMAGE = Image.new("RGB", (64, 64), "teal")
BUILDING, CHECKING, SERVING = EngineState.BUILDING, EngineState.CHECKING, EngineState.SERVING


class Better(FakePipeline):
    engine = ENGINE


def busy_work() -> None:
    """Takes some thousand times as long as a fake call."""
    sum(range(300_000))


def slow() -> FakePipeline:
    pipeline = FakePipeline()
    pipeline.before_call = busy_work
    return pipeline


@contextlib.contextmanager
def attempt(
    candidate: FakeCandidate, serving: FakePipeline, clock: Callable[[], float], step: bool = False
) -> Iterator[tuple[Engine, WatchedStore, list[Span]]]:
    """An engine on a manual clock, whose model "m" is contended for; stepped by the test where `step` is set."""
    store, spans = WatchedStore(serving), list[Span]()
    engine = Engine(store.pipelines(), clock=clock, observe=spans.append)
    promotion = Promotion(engine, store, [candidate])
    if not step:
        engine.start()
    promotion.start()
    try:
        yield engine, store, spans
    finally:
        promotion.stop()
        engine.close()
        assert promotion.join(120)


def pair(better: float = 1.0, serving: float = 2.0) -> tuple[Better, FakePipeline, Clock]:
    """Two engines whose steps take so many seconds of a clock."""
    clock = Clock()
    return Better(clock, lambda rows: better), FakePipeline(clock, lambda rows: serving), clock


def test_current_engine_serves_until_the_new_one_is_promoted(tmp_path: Path) -> None:
    """The whole story, as clients see it."""
    store, candidate = WatchedStore(slow()), FakeCandidate(tmp_path, Better())
    with running(lambda: store, [candidate]) as server, Client(f"localhost:{server.port}", timeout=60) as client:
        store.wait_for(BUILDING, detail="half of it")
        assert client.transform(IMAGE).engine == "fake:cpu"
        (model,) = client.models()
        assert model.engine == "fake:cpu"
        (engine,) = model.engines
        assert (engine.name, engine.state, engine.detail, engine.progress) == (ENGINE, "building", "half of it", 0.5)
        candidate.let()
        assert store.end().state is SERVING
        assert client.transform(IMAGE).engine == ENGINE
        (model,) = client.models()
        assert (model.id, model.engine, model.engines[0].state) == ("m", ENGINE, "serving")
        assert "a step takes" in model.engines[0].detail
    states = [status.state for status in store.story]
    assert sorted(set(states), key=states.index) == [BUILDING, CHECKING, SERVING]
    progress = [status.progress for status in store.story if status.state is CHECKING]
    assert progress == sorted(progress)


def test_candidate_is_not_visible_during_its_check(tmp_path: Path) -> None:
    better, held, go = Better(), threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        assert go.wait(60)

    candidate = FakeCandidate(tmp_path, better)
    better.before_call = hold
    store = WatchedStore(slow())
    with (
        running(lambda: store, [candidate]) as server,
        Client(f"localhost:{server.port}", timeout=60) as client,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        candidate.let()
        assert held.wait(60)
        assert [model.id for model in client.models()] == ["m"]
        assert client.model("m").engines[0].state == "checking"
        with pytest.raises(ModelNotFound):
            client.transform(IMAGE, model=f"m/{ENGINE}")
        with pytest.raises(ModelNotFound):
            client.model(f"m/{ENGINE}")
        health = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            health.Check(health_pb2.HealthCheckRequest(service=f"models/m/{ENGINE}"))  # type: ignore[attr-defined]
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        go.set()
        assert store.end().state is SERVING


def test_promotion_delays_no_request_by_more_than_a_step(tmp_path: Path) -> None:
    """A long request is in progress through all of it: loaded, tried, taken over."""
    better, serving, clock = pair()
    candidate = FakeCandidate(tmp_path, better)
    with attempt(candidate, serving, clock, step=True) as (engine, store, spans):
        user = Caller(engine).submit(num_inference_steps=10**6)
        candidate.let()
        while store.get("m").engines[0].state in (BUILDING, CHECKING):
            engine.step()
        assert store.end().state is SERVING
        engine.step()
        (state,) = serving.prepared[:1]
        assert state in better.batches[-1]
        assert state.request.num_inference_steps == 10**6
        assert user.ticket is not None
        user.ticket.cancel()
        while not user.endings:  # the engine's own thread steps, too: closing the old engine has started it
            engine.step()
        assert len(user.endings) == 1
        calls = [span.model for span in spans if span.stage == "denoise"]
        begun = calls.index("m")
        assert {f"m/{ENGINE}", "m/fake:cpu"} < set(calls)
        assert all("m" in two for two in zip(calls[begun:], calls[begun + 1 :], strict=False))


@pytest.mark.parametrize(
    ("settings", "seconds", "why"),
    [
        ({"problem": "PSNR 12.0 dB, the minimum is 35.0"}, 1.0, "PSNR 12.0 dB"),
        ({"trials": 0}, 1.0, "no reference images"),
        ({}, 3.0, "not faster: a step takes 3000.00 ms, on fake:cpu 2000.00 ms"),
        ({}, 1.99, "not faster"),
    ],
    ids=["wrong", "nothing to judge by", "slower", "as fast"],
)
def test_wrong_or_slower_candidate_is_rejected(tmp_path: Path, settings: dict[str, object], seconds: float, why: str) -> None:
    better, serving, clock = pair(better=seconds)
    candidate = FakeCandidate(tmp_path, better, **settings)  # type: ignore[arg-type]
    with attempt(candidate, serving, clock) as (engine, store, _):
        candidate.let()
        ended = store.end()
        assert ended.state is EngineState.REJECTED
        assert (better.closed, serving.closed) == (True, False), "what lost leaves nothing behind"
        assert why in ended.detail
        assert_serves_as_before(engine, store, serving)


@pytest.mark.parametrize("trouble", ["denoise", "finish", "load", "bug", "fail", "crash"])
def test_failing_candidate_does_not_affect_the_current_engine(tmp_path: Path, trouble: str) -> None:
    better, serving, clock = pair()
    candidate = FakeCandidate(tmp_path, better)
    if trouble in ("denoise", "finish"):
        candidate.trials = lambda: [make_request(prompt=f"fail {trouble}")]  # type: ignore[method-assign]
    if trouble in ("load", "bug"):
        candidate.before_load = lambda: fail(BundleError("/a/path") if trouble == "load" else KeyError("/a/path"))
    with attempt(candidate, serving, clock) as (engine, store, _):
        candidate.let(trouble if trouble in ("fail", "crash") else "right")
        ended = store.end()
        assert ended.state is EngineState.FAILED
        assert "/" not in ended.detail, "callers hear nothing of the server's disk"
        assert_serves_as_before(engine, store, serving)


def fail(error: Exception) -> None:
    raise error


def assert_serves_as_before(engine: Engine, store: WatchedStore, serving: FakePipeline) -> None:
    """The model runs as it did, and nothing is left of what was tried."""
    done = threading.Event()
    engine.submit(make_request(), lambda event: done.set() if type(event).__name__ == "Completed" else None)
    assert done.wait(60)
    assert store.get("m").pipeline is serving
    assert serving.batches[-1][0].request.model == "m"
    with pytest.raises(ModelNotLoaded):
        engine.submit(make_request(model=f"m/{ENGINE}"), lambda event: None)


def test_built_engines_are_reused_and_damaged_or_stale_ones_are_rebuilt(tmp_path: Path) -> None:
    def takes_over(built: int, version: int = 1) -> FakeCandidate:
        better, serving, clock = pair()
        candidate = FakeCandidate(tmp_path, better, version=version)
        with attempt(candidate, serving, clock) as (_, store, _):
            if built:
                candidate.let()
            assert store.end().state is SERVING
        assert candidate.built == built
        return candidate

    takes_over(built=1)
    candidate = takes_over(built=0)
    (candidate.entry / "engine").write_text("wrong")
    takes_over(built=1)
    takes_over(built=1, version=2)
    takes_over(built=0)


def test_a_killed_build_is_repeated(tmp_path: Path) -> None:
    for word, state in (("crash", EngineState.FAILED), ("right", SERVING)):
        better, serving, clock = pair()
        candidate = FakeCandidate(tmp_path, better)
        with attempt(candidate, serving, clock) as (_, store, _):
            candidate.let(word)
            assert store.end().state is state
        assert candidate.built == 1


@pytest.mark.parametrize("phase", ["building", "loading", "drawing", "timing"])
def test_drain_completes_in_every_promotion_phase(tmp_path: Path, phase: str) -> None:
    better, reached = Better(), threading.Event()
    candidate = FakeCandidate(tmp_path, better)

    def wait_for_the_end() -> None:
        ended = threading.Event()
        with candidate.stop.ending(ended.set):
            reached.set()
            assert ended.wait(60)

    if phase == "loading":
        candidate.before_load = wait_for_the_end
    if phase == "drawing":
        better.before_call = wait_for_the_end
    if phase == "timing":
        candidate.judge = lambda images: setattr(better, "before_call", wait_for_the_end) or ""  # type: ignore
    store = WatchedStore(slow())
    with running(lambda: store, [candidate]) as server, Client(f"localhost:{server.port}", timeout=60) as client:
        assert client.transform(IMAGE).engine == "fake:cpu"
        if phase == "building":
            store.wait_for(BUILDING, detail="half of it")
        else:
            candidate.let()
            assert reached.wait(60)
    ended = store.end()
    assert (ended.state, ended.detail) == (EngineState.FAILED, "the server is shutting down")
    assert not (tmp_path / "cache").joinpath("engine").exists()
    assert not any(path.name.endswith(".building") for path in (tmp_path / "cache").iterdir())

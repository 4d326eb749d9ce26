"""A model that is unloaded takes its candidates with it: they do not bring it back, and nothing of them is left."""

import gc
import threading
import weakref
from pathlib import Path

import grpc
import pytest
from fake_candidate import ENGINE, FakeCandidate, WatchedStore
from fakes import FakePipeline
from img2img.v1 import model_pb2
from img2img.v1.model_pb2_grpc import ModelServiceStub
from img2img_server.engine.engine import Engine
from img2img_server.models.promotion import Promotion
from img2img_server.models.registry import EngineState, ModelState
from img2img_server.support.cancellation import Stopped
from running import running


class Better(FakePipeline):
    engine = ENGINE


def unload(stub: ModelServiceStub) -> model_pb2.Model:
    return stub.UnloadModel(model_pb2.UnloadModelRequest(id="m"), timeout=60).model


def test_unload_stops_the_build(tmp_path: Path) -> None:
    serving = FakePipeline()
    store, candidate = WatchedStore(serving), FakeCandidate(tmp_path, Better())
    with running(lambda: store, [candidate]) as server, grpc.insecure_channel(f"localhost:{server.port}") as channel:
        store.wait_for(EngineState.BUILDING, detail="half of it")
        model = unload(ModelServiceStub(channel))
        assert model.state == model_pb2.MODEL_STATE_UNLOADED
        assert store.end().detail == "the model was unloaded"
        with pytest.raises(Stopped):
            candidate.stop.check()
        assert store.get("m").engines == (), "they were for what is gone"
        watched = weakref.ref(serving)
        del serving
        gc.collect()
        assert watched() is None
    assert store.get("m").state is ModelState.UNLOADED


def test_unload_stops_the_trial_of_a_candidate(tmp_path: Path) -> None:
    better, held, go = Better(), threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        assert go.wait(60)

    better.before_call = hold
    store, candidate = WatchedStore(FakePipeline()), FakeCandidate(tmp_path, better)
    with running(lambda: store, [candidate]) as server, grpc.insecure_channel(f"localhost:{server.port}") as channel:
        candidate.let()
        assert held.wait(60)
        stub = ModelServiceStub(channel)
        unloading = stub.UnloadModel.future(model_pb2.UnloadModelRequest(id="m"), timeout=60)
        while not candidate.stop.asked:
            pass
        assert not unloading.done(), "it is at work on the device still"
        go.set()
        assert unloading.result().model.state == model_pb2.MODEL_STATE_UNLOADED
        assert store.end().detail == "the model was unloaded"
        assert store.get("m").pipeline is None


def test_unload_prevents_waiting_builds(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first, second = FakeCandidate(tmp_path / "first", Better()), FakeCandidate(tmp_path / "second", Better())
    second.engine = "fake:best"
    store = WatchedStore(FakePipeline())
    with running(lambda: store, [first, second]) as server, grpc.insecure_channel(f"localhost:{server.port}") as channel:
        store.wait_for(EngineState.BUILDING, detail="half of it")
        unload(ModelServiceStub(channel))
    assert second.built == 0


def test_promoted_engine_can_be_unloaded(tmp_path: Path) -> None:
    better = Better()
    better.before_call = lambda: None
    serving = FakePipeline()
    serving.before_call = lambda: sum(range(300_000))
    store, candidate = WatchedStore(serving), FakeCandidate(tmp_path, better)
    with running(lambda: store, [candidate]) as server, grpc.insecure_channel(f"localhost:{server.port}") as channel:
        candidate.let()
        assert store.end().state is EngineState.SERVING
        assert (better.closed, serving.closed) == (False, True)
        stub = ModelServiceStub(channel)
        assert unload(stub).state == model_pb2.MODEL_STATE_UNLOADED
        assert better.closed


def test_waiting_for_a_loading_model_ends_at_shutdown(tmp_path: Path) -> None:
    """Loading cannot be stopped: the thread that waits for it, to unload the model, would keep the process from ending."""
    pipeline, loading, go = FakePipeline(), threading.Event(), threading.Event()

    def hold() -> None:
        loading.set()
        assert go.wait(60)

    store, candidate = WatchedStore(pipeline), FakeCandidate(tmp_path, Better())
    candidate.before_load = hold
    engine = Engine({"m": pipeline})
    promotion = Promotion(engine, store, [candidate])
    promotion.start()
    candidate.let()
    assert loading.wait(60)
    waiting = threading.Thread(target=promotion.withdraw, args=("m",))
    waiting.start()
    while not candidate.stop.asked:
        pass
    promotion.stop()
    waiting.join(120)
    stuck = waiting.is_alive()
    go.set()
    assert promotion.join(60)
    assert not stuck

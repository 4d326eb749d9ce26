"""Residency: models come into memory when they are wanted, never beyond the budget, and never leave while they are in use."""

import asyncio
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import make_request
from img2img_server.bundle.manifest import Source
from img2img_server.config import ModelSettings
from img2img_server.engine.request import Completed, Event, Failed
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.errors import (
    BundleError,
    ModelMemoryFull,
    ModelNotFound,
    ModelNotLoaded,
    ModelUnavailable,
    PermissionDenied,
    ShuttingDown,
)
from img2img_server.models.downloads import EXPORTER
from img2img_server.models.memory import Estimates, session_bytes
from img2img_server.models.registry import Model, ModelRegistry, ModelState
from img2img_server.support.call import Call, answering
from model_folder import MB, LoadedPipeline, Memory, Rig, make_bundle, rig

READY, UNLOADED, LOADING, FAILED = ModelState.READY, ModelState.UNLOADED, ModelState.LOADING, ModelState.FAILED


def named(name: str) -> Source:
    return Source(path=name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three models, each 200 MB in memory."""
    for name in "abc":
        make_bundle(tmp_path / "store" / name)
    return tmp_path / "store"


async def use(rig: Rig, name: str) -> Model:
    async with rig.residency.using(named(name)) as model:
        return model


async def state_is(rig: Rig, name: str, state: ModelState, detail: str = "") -> None:
    await rig.until(lambda: rig.store.get(name).state is state and detail in rig.store.get(name).detail)


async def test_waiting_requests_share_one_load(folder: Path) -> None:
    async with rig(folder) as it:
        assert [model.state for model in it.store] == [UNLOADED] * 3
        assert it.serving == {"a": False, "b": False, "c": False}
        models = await asyncio.gather(*(use(it, "a") for _ in range(10)))
        assert {id(model.pipeline) for model in models} == {id(it.memory.opened[0])}
        assert it.memory.names == ["a"]
        assert it.serving == {"a": True, "b": False, "c": False}
        model = it.store.get("a")
        assert (model.state, model.memory, model.detail) == (READY, 200 * MB, "")
        assert it.memory.threads == {"img2img-loading"}, "nothing is loaded on the event loop"


async def test_model_is_warmed_up_and_measured_before_serving(folder: Path) -> None:
    async with rig(folder) as it:
        await use(it, "a")
        (pipeline,) = it.memory.opened
        assert len(pipeline.batches) == 2
        assert pipeline.prepared[0].request.image.size == pipeline.native_size
        assert pipeline.released == pipeline.prepared
        plan = pipeline.plan(make_request())
        assert it.engine.costs.seconds("denoise", ("a", plan.shape), plan.pixels, 1) is not None


async def test_cancelling_does_not_end_the_load(folder: Path) -> None:
    async with rig(folder) as it:
        it.memory.gates["a"] = threading.Event()
        waiters = [asyncio.create_task(use(it, "a")) for _ in range(3)]
        await state_is(it, "a", LOADING, "loading")
        for waiter in waiters:
            waiter.cancel()
        assert all(isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*waiters, return_exceptions=True))
        it.memory.gates["a"].set()
        await state_is(it, "a", READY)
        assert len(it.memory.opened) == 1


async def test_load_on_request_can_be_disabled(folder: Path) -> None:
    async with rig(folder, load_on_request=False) as it:
        with pytest.raises(ModelNotLoaded, match="'a' is not loaded"):
            await use(it, "a")
        assert (await it.residency.load(named("a"))).state is READY
        await use(it, "a")
        await it.residency.unload("a")
        with pytest.raises(ModelNotLoaded):
            await use(it, "a")


async def test_least_recently_used_model_is_evicted(folder: Path) -> None:
    async with rig(folder, memory=450 * MB) as it:
        for name in ("a", "b", "a", "c"):
            await use(it, name)
        assert sorted(it.memory.names) == ["a", "c"]
        assert it.serving == {"a": True, "b": False, "c": True}
        assert it.store.get("b").state is UNLOADED
        await use(it, "b")
        assert sorted(it.memory.names) == ["b", "c"]
        assert it.memory.peak <= 450 * MB


async def test_models_in_use_are_not_evicted(folder: Path) -> None:
    async with rig(folder, memory=450 * MB) as it:
        async with it.residency.using(named("a")), it.residency.using(named("b")):
            with pytest.raises(ModelMemoryFull, match=r"takes about 203\.6 MB, and 400\.0 MB of 450") as caught:
                await use(it, "c")
            assert caught.value.retry_after is not None
            assert caught.value.retry_after >= 1
            assert it.store.get("c").state is UNLOADED
        await use(it, "c")
        assert sorted(it.memory.names) == ["a", "c"], "b was left before a"


async def test_models_that_never_fit_are_refused_with_sizes(folder: Path) -> None:
    async with rig(folder, memory=150 * MB) as it:
        with pytest.raises(ModelUnavailable, match=r"takes about 203\.6 MB, and models_memory is 150\.0 MB"):
            await use(it, "a")
        assert it.memory.opened == []
        assert "203.6 MB" in it.store.get("a").detail


async def test_models_too_large_when_loaded_are_evicted_and_remembered(folder: Path) -> None:
    async with rig(folder, memory=450 * MB) as it:
        it.memory.sizes["a"] = 500 * MB
        with pytest.raises(ModelUnavailable, match=r"takes about 500\.0 MB"):
            await use(it, "a")
        assert it.memory.names == []
        with pytest.raises(ModelUnavailable, match=r"takes about 500\.0 MB"):
            await use(it, "a")
        assert len(it.memory.opened) == 1
        await use(it, "b")


async def test_free_gpu_memory_is_the_budget(folder: Path) -> None:
    """Without a configured bound: the GPU's free memory decides, and the process's own memory has no effect."""
    async with rig(folder) as it:
        it.memory.gpu = 450 * MB
        for name in ("a", "b", "a", "c"):
            await use(it, name)
        assert sorted(it.memory.names) == ["a", "c"]
        assert it.memory.loads == ["a", "b", "c"], "none is loaded in vain"
        assert it.store.get("c").memory == 200 * MB
        assert await it.residency.unload("c") == 200 * MB


async def test_memory_setting_applies_on_a_gpu(folder: Path) -> None:
    async with rig(folder, memory=250 * MB) as it:
        it.memory.gpu = 1000 * MB
        await use(it, "a")
        await use(it, "b")
        assert it.memory.names == ["b"]


async def test_load_that_runs_out_of_memory_evicts_models_and_retries(folder: Path) -> None:
    """The model takes more than estimated: idle models are evicted, the least recently used first, until it fits."""
    async with rig(folder) as it:
        it.memory.gpu, it.memory.sizes["c"] = 650 * MB, 400 * MB
        for name in ("b", "a", "c"):
            await use(it, name)
        assert sorted(it.memory.names) == ["a", "c"]
        assert it.memory.loads == ["b", "a", "c", "c"]
        it.memory.sizes["c"] = 600 * MB
        await it.residency.unload("c")
        await use(it, "b")
        await use(it, "c")
        assert it.memory.names == ["c"]
        assert it.store.get("c").memory == 600 * MB


async def test_model_in_use_is_not_evicted_by_a_load_out_of_memory(folder: Path) -> None:
    async with rig(folder) as it:
        it.memory.gpu, it.memory.sizes["b"] = 450 * MB, 400 * MB
        async with it.residency.using(named("a")):
            with pytest.raises(ModelUnavailable, match="out of memory"):
                await use(it, "b")
            assert it.memory.names == ["a"]
        assert (await it.residency.load(named("b"))).state is READY
        assert it.memory.names == ["b"]


async def test_models_larger_than_the_gpu_evict_nothing(folder: Path) -> None:
    make_bundle(folder / "d", 500 * MB)
    async with rig(folder) as it:
        it.memory.gpu = 450 * MB
        await use(it, "a")
        with pytest.raises(ModelUnavailable, match="out of memory"):
            await use(it, "d")
        assert it.memory.names == ["a"]


async def test_models_are_closed_on_the_thread_that_runs_them(folder: Path) -> None:
    """Between two rounds of the engine, so no session is closed during a call or a recording."""
    async with rig(folder, memory=250 * MB) as it:
        for name in "abc":
            await use(it, name)
        await it.residency.unload("c")
        assert it.memory.names == []
        assert [pipeline.closed_by for pipeline in it.memory.opened] == ["img2img-engine"] * 3


async def test_memory_budget_holds_under_concurrent_use(folder: Path) -> None:
    """Users of three models in random order, with memory for two: no model is unloaded while in use, and three are never
    loaded."""
    rng = random.Random(6)
    async with rig(folder, memory=450 * MB) as it:
        outcomes: list[str] = []

        async def user(name: str, turns: int) -> None:
            try:
                async with it.residency.using(named(name)) as model:
                    pipeline: Any = model.pipeline
                    for _ in range(turns):
                        assert not pipeline.closed
                        assert it.memory.used <= 450 * MB
                        await asyncio.sleep(0)
                    assert not pipeline.closed
                    outcomes.append("used")
            except ModelMemoryFull:
                outcomes.append("full")

        async def unloader(name: str) -> None:
            assert await it.residency.unload(name) in (0, 200 * MB)
            outcomes.append("unloaded")

        jobs = [user(rng.choice("abc"), rng.randrange(5)) for _ in range(60)] + [unloader(rng.choice("abc")) for _ in range(10)]
        rng.shuffle(jobs)
        tasks = []
        for job in jobs:
            tasks.append(asyncio.create_task(job))
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)
        for task in rng.sample(tasks, 10):
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(end) for end in ended} <= {type(None), asyncio.CancelledError}
        assert outcomes.count("used") > 0
        assert it.memory.peak <= 450 * MB
        for name in "abc":
            await use(it, name)


async def test_unload_waits_for_running_requests_and_frees_memory(folder: Path) -> None:
    async with rig(folder) as it:
        async with it.residency.using(named("a")):
            unload = asyncio.create_task(it.residency.unload("a"))
            await state_is(it, "a", READY, "being unloaded")
            later = asyncio.create_task(use(it, "a"))
            for _ in range(20):
                await asyncio.sleep(0)
            assert not unload.done()
            assert not later.done()
            assert it.memory.names == ["a"]
        assert await unload == 200 * MB
        assert (await later).pipeline is it.memory.opened[1], "who came meanwhile has it loaded again"
        assert it.memory.opened[0].closed
        assert await it.residency.unload("a") == 200 * MB
        assert await it.residency.unload("a") == 0, "there is nothing to unload"
        assert it.serving["a"] is False


async def test_model_of_a_cancelled_request_stays_loaded_until_it_ends(folder: Path) -> None:
    """The lease has ended, and the device still computes."""
    async with rig(folder) as it:
        await use(it, "a")
        (pipeline,) = it.memory.opened
        called, go = threading.Event(), threading.Event()

        def hold() -> None:
            called.set()
            assert go.wait(60)

        pipeline.before_call = hold
        events: list[Event] = []
        ticket = it.engine.submit(make_request(model="a"), events.append).ticket
        await asyncio.to_thread(called.wait)
        ticket.cancel()
        unload = asyncio.create_task(it.residency.unload("a"))
        await state_is(it, "a", READY, "being unloaded")
        for _ in range(20):
            await asyncio.sleep(0)
        assert not pipeline.closed
        go.set()
        assert await unload == 200 * MB
        assert isinstance(events[-1], Failed)
        assert pipeline.released == pipeline.prepared, "its state was released before"


async def test_broken_model_fails_its_load_and_is_not_retried_per_request(folder: Path) -> None:
    async with rig(folder) as it:
        it.memory.problems["a"] = RuntimeError("told to fail at /a/path")
        for _ in range(3):
            with pytest.raises(
                ModelUnavailable,
                match=r"'a' cannot be served: it could not be loaded \(RuntimeError\); the server's log says why",
            ) as caught:
                await use(it, "a")
            assert "/a/path" not in str(caught.value)
        assert it.memory.loads == ["a"]
        problem = "it could not be loaded: RuntimeError: told to fail at /a/path"
        assert (it.store.get("a").state, it.store.get("a").problem) == (FAILED, problem)
        with pytest.raises(ModelUnavailable, match="possible in 5 s"):
            await use(it, "a")
        it.clock.now = 5.0
        with pytest.raises(ModelUnavailable):
            await use(it, "a")
        assert it.memory.loads == ["a", "a"]
        with pytest.raises(ModelUnavailable, match="possible in 10 s"):
            await use(it, "a")
        del it.memory.problems["a"]
        assert (await it.residency.load(named("a"))).state is READY, "an operator need not wait"
        assert it.store.get("a").problem == ""


@pytest.mark.parametrize("where", ["prepare", "denoise", "finish"])
async def test_model_that_fails_its_trial_run_is_not_served(where: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig(folder) as it:
        with monkeypatch.context() as patch:
            patch.setattr("img2img_server.models.loader._TRIAL_PROMPT", f"fail {where}")
            with pytest.raises(ModelUnavailable):
                await use(it, "a")
        assert it.store.get("a").state is FAILED
        assert it.memory.names == [], "nothing of it stays"
        it.clock.now = 5.0
        assert (await use(it, "a")).state is READY


async def test_a_damaged_bundle_is_refused_by_its_checksums(folder: Path) -> None:
    (folder / "a" / "unet" / "model.onnx").write_bytes(b"other")
    async with rig(folder) as it:
        with pytest.raises(ModelUnavailable):
            await use(it, "a")
        assert "SHA-256 differs" in it.store.get("a").problem
        assert it.memory.opened == []


async def test_model_load_is_not_starved_by_a_full_queue(folder: Path) -> None:
    """Other requests keep the engine busy all the time; the load's trial request does not wait behind all of them."""
    async with rig(folder) as it:
        await use(it, "a")
        going = True

        def again(event: Event) -> None:
            if isinstance(event, Completed) and going:
                it.engine.submit(make_request(model="a", client="crowd"), again)

        for _ in range(100):
            it.engine.submit(make_request(model="a", client="crowd"), again)
        await use(it, "b")
        going = False
        await asyncio.to_thread(it.engine.wait_until_idle, "a")


async def test_loading_does_not_wait_for_waiting_requests(folder: Path) -> None:
    """Callers of a loading model hold every slot of the queue."""
    it = Rig(folder, ModelSettings(preload=("none",)), EXPORTER, QueueLimits(max_waiting=1))
    it.engine.start()
    try:
        with it.engine.reserve():
            async with asyncio.timeout(60), it.residency.using(named("b")) as model:
                assert model.pipeline is not None
    finally:
        await it.residency.close()
        it.engine.close()


async def test_close_aborts_running_loads(folder: Path) -> None:
    async with rig(folder) as it:
        it.memory.gates["a"] = threading.Event()
        waiter = asyncio.create_task(use(it, "a"))
        await state_is(it, "a", LOADING, "loading")
        await it.residency.close()
        with pytest.raises(ShuttingDown):
            await waiter
        with pytest.raises(ShuttingDown):
            await use(it, "b")
        it.memory.gates["a"].set()


async def test_withdraw_is_called_before_the_model_is_closed(folder: Path) -> None:
    async with rig(folder) as it:
        await use(it, "a")
        asked: list[tuple[str, bool]] = []
        it.residency.withdraw = lambda name: asked.append((name, it.memory.opened[0].closed))
        await it.residency.unload("a")
        assert asked == [("a", False)]


async def test_caller_can_use_only_its_allowed_models(folder: Path) -> None:
    async with rig(folder) as it:
        with answering(Call("m", "r", client="alice", models=("a*",), admin=False)):
            await use(it, "a")
            for name in ("b", "nobody's", "../b"):
                with pytest.raises(PermissionDenied):
                    await use(it, name)
            with pytest.raises(PermissionDenied, match="'c'"):
                await use_repository(it, "acme/c")
            with pytest.raises(ModelNotFound):
                await it.residency.unload("b")
        assert it.memory.names == ["a"]


async def use_repository(it: Rig, repo_id: str) -> None:
    async with it.residency.using(Source(repo_id=repo_id)):
        pass


def test_preload_setting_chooses_the_models_loaded_at_start(folder: Path) -> None:
    def loaded(**settings: Any) -> list[str]:
        memory = Memory()
        ModelRegistry.load(folder, memory.load, settings=ModelSettings(**{"preload": ("all",), **settings}), meter=memory)
        return memory.names

    assert loaded() == ["a", "b", "c"]
    assert loaded(preload=("none",)) == []
    assert loaded(preload=("c", "b")) == ["b", "c"]
    assert loaded(memory=450 * MB) == ["a", "b"], "as many as fit"
    with pytest.raises(BundleError, match="model 'x' does not exist; available: a, b, c"):
        loaded(preload=("x",))
    assert loaded(preload=("a", "b"), memory=250 * MB) == ["a"], "the other one can be loaded when it is asked for"
    (folder / "b" / "unet" / "model.onnx").write_bytes(b"other")
    assert loaded() == ["a", "c"]
    assert loaded(preload=("b", "c")) == ["c"], "one that fails is no reason not to serve the others"


def test_the_default_model_is_the_first_to_be_loaded(folder: Path) -> None:
    memory = Memory()
    store = ModelRegistry.load(folder, memory.load, "c", settings=ModelSettings(memory=250 * MB, preload=("all",)), meter=memory)
    assert memory.names == ["c"]
    assert store.get("c").memory == 200 * MB
    manifest = store.get("a").manifest
    assert manifest is not None
    assert store.get("a").expected_memory == Estimates().memory(manifest) > 100 * MB


def control_of(rig: Rig, name: str, takes: int) -> LoadedPipeline:
    """A pipeline whose control graph is not open yet: 100 MB of weights, which take so many bytes in memory."""
    pipeline = rig.store.get(name).pipeline
    assert isinstance(pipeline, LoadedPipeline)
    pipeline.unopened_bytes, pipeline.control_bytes = 100 * MB, takes
    return pipeline


@pytest.mark.parametrize(("takes", "counts"), [(150, 150), (0, 170)], ids=["measured", "estimated"])
async def test_control_graph_evicts_idle_models_for_its_memory(folder: Path, takes: int, counts: int) -> None:
    """It counts in the model's memory. All waiting requests share one load, even if some are cancelled."""
    async with rig(folder, memory=500 * MB) as it:
        for name in ("a", "b"):
            await use(it, name)
        async with it.residency.using(named("a")):
            pipeline = control_of(it, "a", takes * MB)
            waiting = [asyncio.create_task(it.residency.open_control("a")) for _ in range(3)]
            await asyncio.sleep(0)
            waiting[0].cancel()
            ends = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(end) for end in ends] == [asyncio.CancelledError, type(None), type(None)]
            await it.residency.open_control("a")
        assert pipeline.controls_opened == 1
        assert it.store.get("a").memory == (200 + counts) * MB
        assert it.memory.names == ["a"], "both and the control graph would take more than 500 MB"
        await use(it, "c")
        assert it.memory.names == ["c"], "nor do they with another model"


async def test_graphs_that_calls_opened_count_in_the_models_memory(folder: Path) -> None:
    """OpenVINO's graphs for other sizes. Those that were opened while the model was measured are counted already."""
    async with rig(folder, memory=650 * MB) as it:
        for name in ("a", "b"):
            await use(it, name)
        pipeline = control_of(it, "a", 100 * MB)
        pipeline.opened_bytes = 100 * MB
        assert it.store.get("a").expected_memory == 300 * MB
        await use(it, "c")
        assert sorted(it.memory.names) == ["b", "c"], "the three would take 700 MB"
        assert it.store.get("a").expected_memory == 200 * MB, "loaded again, it takes what it took then"
        with it.store.growing("b", it.memory):
            control_of(it, "b", 0).opened_bytes = 100 * MB
        assert it.store.get("b").expected_memory == 200 * MB
        pipeline = control_of(it, "b", 0)
        pipeline.opened_bytes = 150 * MB
        with it.store.growing("b", it.memory):
            pass
        assert it.store.get("b").expected_memory == 250 * MB, "the graph of 50 MB that was opened before still counts"


async def test_control_graph_without_memory_for_it_is_refused(folder: Path) -> None:
    async with rig(folder, memory=500 * MB) as it:
        async with it.residency.using(named("a")), it.residency.using(named("b")):
            pipeline = control_of(it, "a", 150 * MB)
            with pytest.raises(ModelMemoryFull, match="not enough memory for model 'a' now: it takes about 370"):
                await it.residency.open_control("a")
            pipeline.unopened_bytes = 200 * MB
            with pytest.raises(
                ModelUnavailable,
                match=r"'a' cannot run with controls or image prompts: it takes about 540\.0 MB, and models_memory is 500\.0 MB",
            ):
                await it.residency.open_control("a")
        assert (pipeline.controls_opened, it.store.get("a").state, it.store.get("a").detail) == (0, READY, "")
        assert sorted(it.memory.names) == ["a", "b"]
        pipeline.unopened_bytes = 100 * MB
        await it.residency.open_control("a")
        assert it.memory.names == ["a"]


def test_the_estimate_counts_each_lora_graph(folder: Path) -> None:
    """Whose session has its own copy of the weights, if the server has LoRAs."""
    plain, adapted = (
        ModelRegistry.find_bundles(folder, Memory().load, estimates=Estimates(loras)).get("a") for loras in (False, True)
    )
    assert adapted.expected_memory == plain.expected_memory, "the bundle has no LoRA graph"
    assert adapted.manifest is not None
    component = replace(adapted.manifest.components[0], lora="unet/lora.onnx")
    manifest = replace(adapted.manifest, components=(component,), files={**adapted.manifest.files, "unet/lora.onnx": ""})
    sizes = [replace(model, manifest=manifest).expected_memory for model in (plain, adapted)]
    assert sizes == [plain.expected_memory, plain.expected_memory + session_bytes(100 * MB)]


async def test_oversized_model_is_released_before_the_next_load(folder: Path) -> None:
    """The next model does not use its memory before it is released."""
    async with rig(folder, memory=450 * MB) as it:
        it.memory.sizes["a"], it.memory.gates["a"] = 500 * MB, threading.Event()
        first = asyncio.create_task(use(it, "a"))
        await state_is(it, "a", LOADING, "loading")
        second = asyncio.create_task(use(it, "b"))
        await state_is(it, "b", LOADING, "waiting")
        it.memory.gates["a"].set()
        with pytest.raises(ModelUnavailable):
            await first
        await second
        assert it.memory.peak <= 500 * MB
        assert it.memory.names == ["b"]

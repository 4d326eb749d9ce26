"""A replica in this process behaves like a single server, and cancelled calls are cancelled in its engine."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import FakePipeline, make_request
from img2img_server.backends.local import LocalBackend
from img2img_server.backends.ray.messages import Card, ModelQuery, RemoteRequest, Unloaded
from img2img_server.backends.ray.replica import Replica
from img2img_server.bundle.manifest import Source
from img2img_server.config import ModelSettings, ServerConfig
from img2img_server.engine.request import Completed, ControlUse, Failed, ImagePromptUse, Plan, Progress, Queued, Request, Started
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.errors import (
    DeadlineExpired,
    EngineStuck,
    InvalidField,
    ModelNotFound,
    ModelNotLoaded,
    PermissionDenied,
    QueueFull,
    ShuttingDown,
)
from img2img_server.models.registry import ModelRegistry, ModelState
from img2img_server.support.call import Call
from model_folder import Memory, make_bundle
from PIL import Image
from running import store

ANYBODY = Call("", "")


class Gate:
    """Holds calls of a model until it is opened. `reached` is set on the event loop when one has come."""

    def __init__(self) -> None:
        self.open, self.reached = threading.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __call__(self) -> None:
        self._loop.call_soon_threadsafe(self.reached.set)
        assert self.open.wait(60)


class Picky(FakePipeline):
    """Refuses a prompt when it plans."""

    def plan(self, request: Request) -> Plan:
        if request.prompt == "no":
            raise InvalidField("prompt", "not this one")
        return super().plan(request)


@asynccontextmanager
async def replica(models: ModelRegistry, **settings: object) -> AsyncIterator[Replica]:
    """A replica that is open. `settings` are ServerConfig's."""
    config = ServerConfig(**{"models": Path(), "warm_up": 0.0, **settings})  # type: ignore[arg-type]
    made = Replica(config, lambda config: LocalBackend(config, lambda: models))
    await made.open()
    try:
        yield made
    finally:
        await made.close()


def job(**settings: object) -> RemoteRequest:
    return RemoteRequest.of(make_request(**settings), 0.0)


async def test_a_request_is_answered_with_its_image() -> None:
    image = Image.effect_noise((16, 8), 90).convert("RGB")
    async with replica(store(m=FakePipeline())) as it:
        ended = await it.transform(job(image=image, seeds=(1, 2), follow=False))
    assert isinstance(ended, Completed)
    assert [each.tobytes() for each in ended.images] == [image.tobytes()] * 2


async def test_stream_yields_every_event_in_order() -> None:
    async with replica(store(m=FakePipeline())) as it:
        told = [event async for event in it.stream(job(num_inference_steps=3, preview_interval=2))]
    assert [type(event) for event in told] == [Queued, Started, Progress, Progress, Progress, Completed]
    steps = [event for event in told if isinstance(event, Progress)]
    assert [step.step for step in steps] == [1, 2, 3]
    assert [step.preview is not None for step in steps] == [False, True, False]


@pytest.mark.parametrize(
    "uses",
    [
        lambda name: {"controls": (ControlUse(name, Image.new("RGB", (16, 16))),)},
        lambda name: {"image_prompts": (ImagePromptUse("plus", (Image.new("RGB", (8, 8)),), encoder=name),)},
    ],
    ids=["controls", "image_prompts"],
)
async def test_a_request_keeps_its_controlnets_and_image_encoders_in_memory(uses: Callable[[str], dict[str, Any]]) -> None:
    pipeline, gate = FakePipeline(), Gate()
    pipeline.before_call = gate
    async with replica(store(m=pipeline, net=FakePipeline())) as it:
        calling = asyncio.create_task(it.transform(job(num_inference_steps=1, strength=1.0, **uses("net"))))
        await gate.reached.wait()
        unloading = asyncio.create_task(it.unload(ModelQuery(ANYBODY, name="net")))
        await it.look()
        assert not unloading.done()
        gate.open.set()
        assert isinstance(await calling, Completed)
        assert isinstance(await unloading, Unloaded)
        missing = await it.transform(job(**uses("none")))
    assert isinstance(missing, Failed)
    assert isinstance(missing.error, ModelNotFound)


@pytest.mark.parametrize("streamed", [False, True])
async def test_cancelled_call_is_removed_from_the_engine(streamed: bool) -> None:
    pipeline, gate = FakePipeline(), Gate()
    pipeline.before_call = gate

    async def call(it: Replica) -> None:
        if not streamed:
            await it.transform(job(num_inference_steps=50))
            return
        async with aclosing(it.stream(job(num_inference_steps=50))) as events:
            async for _ in events:
                pass

    async with replica(store(m=pipeline)) as it:
        calling = asyncio.create_task(call(it))
        await gate.reached.wait()
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        gate.open.set()
    assert len(pipeline.batches) == 1, "the step under way is the last"
    assert len(pipeline.released) == 1


async def test_errors_are_returned_as_failed_events() -> None:
    gate = Gate()
    pipeline = Picky()
    async with replica(store(m=pipeline), limits=QueueLimits(max_waiting=1, max_active=1)) as it:
        refused = await it.transform(job(prompt="no"))
        assert isinstance(refused, Failed)
        assert isinstance(refused.error, InvalidField)
        assert refused.error.field == "prompt"
        (unknown,) = [event async for event in it.stream(job(model="other"))]
        assert isinstance(unknown, Failed)
        assert isinstance(unknown.error, ModelNotFound)
        late = await it.transform(RemoteRequest.of(make_request(deadline=1.0), 2.0))
        assert isinstance(late, Failed)
        assert isinstance(late.error, DeadlineExpired)
        pipeline.before_call = gate
        running = asyncio.create_task(it.transform(job()))
        await gate.reached.wait()
        waiting = it.stream(job())
        assert isinstance(await anext(waiting), Queued)
        full = await it.transform(job())
        assert isinstance(full, Failed)
        assert isinstance(full.error, QueueFull)
        assert full.error.retry_after > 0
        gate.open.set()
        assert isinstance(await running, Completed)
        await waiting.aclose()


async def test_replica_answers_while_a_model_is_loading(tmp_path: Path) -> None:
    memory = Memory()
    memory.gates["a"] = threading.Event()
    make_bundle(tmp_path / "a")
    settings = ModelSettings(preload=("none",))
    models = ModelRegistry.load(tmp_path, memory.load, settings=settings, meter=memory)
    async with replica(models, residency=settings) as it:
        (before,) = (await it.look()).cards
        assert (before.state, before.runs_on) == (ModelState.UNLOADED, "")
        running = asyncio.create_task(it.transform(job(model="a")))
        await asyncio.to_thread(memory.loading.wait, 60)
        assert (await it.look()).cards[0].state is ModelState.LOADING
        assert (it.load_now().resident, it.loading()) == ((), ("a",))
        memory.gates["a"].set()
        assert isinstance(await running, Completed)
        assert (it.load_now().resident, it.loading()) == (("a",), ())
        assert isinstance(await it.unload(ModelQuery(ANYBODY, name="a")), Unloaded)
        assert it.load_now().resident == ()
        brought = await it.bring(ModelQuery(ANYBODY, Source(path="a")))
        assert isinstance(brought, Card)
        assert (brought.state, brought.runs_on) == (ModelState.READY, "fake:cpu")


async def test_model_permissions_are_checked_at_the_replica(tmp_path: Path) -> None:
    memory = Memory()
    make_bundle(tmp_path / "a")
    settings = ModelSettings(preload=("none",), load_on_request=False)
    models = ModelRegistry.load(tmp_path, memory.load, settings=settings, meter=memory)
    nobody = Call("", "", models=("b*",))
    async with replica(models, residency=settings) as it:
        answers = [
            await it.bring(ModelQuery(nobody, Source(path="a"))),
            await it.unload(ModelQuery(nobody, name="a")),
            await it.bring(ModelQuery(ANYBODY, Source(path="a"))),
            await it.load(ModelQuery(ANYBODY, Source(path="z"))),
        ]
        kinds = [type(answer.error) for answer in answers if isinstance(answer, Failed)]
        assert kinds == [PermissionDenied, ModelNotFound, ModelNotLoaded, ModelNotFound]
        assert isinstance(await it.load(ModelQuery(ANYBODY, Source(path="a"))), Card)


async def test_closing_finishes_running_work_and_refuses_new_work() -> None:
    pipeline, gate = FakePipeline(), Gate()
    pipeline.before_call = gate
    async with replica(store(m=pipeline)) as it:
        running = asyncio.create_task(it.transform(job()))
        await gate.reached.wait()
        closing = asyncio.create_task(it.close())
        while not isinstance(refused := await it.transform(job(deadline=1.0)), Failed) or not isinstance(
            refused.error, ShuttingDown
        ):
            pass
        gate.open.set()
        assert isinstance(await running, Completed)
        await closing


async def test_a_hanging_device_is_reported_to_callers_and_to_the_controller() -> None:
    pipeline, gate = FakePipeline(), Gate()
    pipeline.before_call = gate
    async with replica(store(m=pipeline), watchdog=0.1) as it:
        it.check_health()
        ended = await it.transform(job())
        assert isinstance(ended, Failed)
        assert isinstance(ended.error, EngineStuck)
        with pytest.raises(EngineStuck, match="denoise of model 'm'"):
            it.check_health()
        load = it.load_now()
        assert (load.seconds, load.resident) == (float("inf"), ())
        gate.open.set()

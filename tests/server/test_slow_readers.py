"""Clients that do not read their responses: they hold no model and few events, and are ended after a timeout."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1 import model_pb2
from img2img.v1.model_pb2_grpc import ModelServiceStub
from img2img_server.api.transform import MAX_POSITIONS, MAX_PREVIEWS, MAX_STEPS, Outbox
from img2img_server.api.transport import MAX_CLIENT_UNREAD, MAX_UNREAD, Readers
from img2img_server.engine.request import Completed, Progress, Queued, Started, Timings
from img2img_server.errors import ClientBusy, Exhausted, ReaderTooSlow
from kserve_calls import serving
from messages import request
from PIL import Image
from soak_parts.hostile import STREAM, UNARY, unread

ANSWER = pb.TransformResponse(model_id="m")


class Never:
    """The context of a call whose client never reads."""

    def __init__(self) -> None:
        self.writing = asyncio.Event()

    async def write(self, message: Any) -> None:
        self.writing.set()
        await asyncio.Event().wait()


class Fast:
    """The context of a call whose client reads."""

    def __init__(self) -> None:
        self.read: list[Any] = []

    async def write(self, message: Any) -> None:
        self.read.append(message)


@pytest.mark.parametrize("method", [STREAM, UNARY])
def test_unread_responses_do_not_keep_a_model_in_use(tmp_path: Path, method: str) -> None:
    with serving(tmp_path) as (server, loaded), grpc.insecure_channel(f"localhost:{server.port}") as channel:
        transform = request(model=pb.ModelReference(path="m"), num_inference_steps=10, preview_interval=1)
        message = pb.TransformStreamRequest(request=transform) if method == STREAM else transform
        with unread(server.port, *[(method, message.SerializeToString())] * 5):
            while len(loaded["m"].released) < 5:  # the engine has finished all of them
                model_state(channel)
            models = ModelServiceStub(channel)
            unloaded = models.UnloadModel(model_pb2.UnloadModelRequest(id="m"), timeout=120).model
            assert unloaded.state == model_pb2.MODEL_STATE_UNLOADED


def model_state(channel: grpc.Channel) -> int:
    return ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest(id="m")).model.state


async def test_slow_reader_is_disconnected() -> None:
    with pytest.raises(ReaderTooSlow):
        await Readers(0.01).write(Never(), ANSWER, "a")


async def test_reading_client_gets_every_message() -> None:
    context = Fast()
    await Readers(60.0).write(context, ANSWER, "a")
    await Readers(0.0).write(context, ANSWER, "a")
    assert context.read == [ANSWER] * 2


async def test_without_a_timeout_a_slow_reader_is_not_disconnected() -> None:
    context = Never()
    writing = asyncio.create_task(Readers(0.0).write(context, ANSWER, "a"))
    await context.writing.wait()
    assert not writing.done()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing


async def test_unread_responses_are_limited_per_client() -> None:
    readers = Readers(60.0)
    held = [readers.unread("a") for _ in range(MAX_CLIENT_UNREAD)]
    for each in held:
        readers.check("a")
        each.__enter__()
    with pytest.raises(ClientBusy):
        readers.check("a")
    readers.check("b")
    held.pop().__exit__(None, None, None)
    readers.check("a")
    others = [readers.unread(f"client {number}") for number in range(MAX_UNREAD - MAX_CLIENT_UNREAD + 1)]
    for each in others:
        each.__enter__()
    with pytest.raises(Exhausted):
        readers.check("b")
    for each in (*held, *others):
        each.__exit__(None, None, None)
    readers.check("b")


async def test_unread_events_are_dropped_except_the_last() -> None:
    outbox, preview = Outbox(), Image.new("RGB", (8, 8))
    for place in range(100):
        outbox.put(Queued(100 - place, None))
    outbox.put(Started(1000))
    for step in range(1000):
        outbox.put(Progress(step + 1, 1000, preview=preview))
    last = Completed((), Timings(1, 2, 3, 4))
    outbox.put(last)
    assert len(outbox) == MAX_POSITIONS + 1 + MAX_STEPS + 1
    events = [await outbox.get() for _ in range(len(outbox))]
    places = [event.position for event in events if isinstance(event, Queued)]
    assert places == list(range(MAX_POSITIONS, 0, -1))
    assert events[MAX_POSITIONS] == Started(1000)
    steps = [event for event in events if isinstance(event, Progress)]
    assert [event.step for event in steps] == list(range(1001 - MAX_STEPS, 1001))
    assert [event.preview is not None for event in steps] == [False] * (MAX_STEPS - MAX_PREVIEWS) + [True] * MAX_PREVIEWS
    assert events[-1] is last
    asking = asyncio.create_task(outbox.get())
    outbox.put(last)
    assert await asking is last

"""Memory of a KServe request is freed with it, without waiting for the garbage collector: an image may be 100 MB."""

import asyncio
import gc
import queue
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from covering import covering
from cycles import no_collection
from img2img.v1 import image_to_image_pb2 as pb
from img2img_server.access.access import Access
from img2img_server.api.kserve import translation
from img2img_server.api.kserve.inference import request_stream
from img2img_server.api.request_stream import RequestStream
from img2img_server.config import TelemetrySettings
from img2img_server.errors import InvalidField, ServerError
from img2img_server.images import ImageLimits
from img2img_server.support.call import Call, answering
from img2img_server.support.fair_queue import FairThreads
from img2img_server.telemetry.telemetry import Telemetry
from kserve_calls import client_of, image_input, number, refused, serving, text
from messages import CallContext, png
from PIL import Image
from tritonclient.grpc import service_pb2  # type: ignore[import-untyped]

SIDE = 1032
HOLDERS = (pb.TransformRequest, service_pb2.ModelInferRequest, translation.Task)


def held() -> list[str]:
    """Large images, and where errors that are still there hold on to requests."""
    found = [repr(each) for each in gc.get_objects() if issubclass(type(each), Image.Image) and each.width == SIDE]
    for error in [each for each in gc.get_objects() if issubclass(type(each), ServerError)]:
        cause: BaseException | None = error
        while cause is not None:
            trace = cause.__traceback__
            while trace is not None:
                if any(isinstance(value, HOLDERS) for value in trace.tb_frame.f_locals.values()):
                    found.append(f"{error!r} in {trace.tb_frame.f_code.co_qualname}")
                trace = trace.tb_next
            cause = cause.__context__
    return found


FILE = png((SIDE, SIDE))
REFUSED: dict[str, tuple[bytes, list[Any]]] = {
    "a result that is too large": (FILE, []),
    "a number out of its bounds": (FILE, [number("strength", 5, np.float32)]),
    "no UTF-8": (FILE, [text("prompt", b"\xff")]),
    "a model that fails": (
        FILE,
        [number("width", 16, np.int64), number("height", 16, np.int64), text("prompt", "fail prepare")],
    ),
    "half a file": (FILE[: len(FILE) // 2], [number("width", 16, np.int64), number("height", 16, np.int64)]),
}


@covering(stream=[False, True], name=REFUSED)
def test_a_refused_requests_image_is_freed_at_once(name: str, stream: bool, tmp_path: Path) -> None:
    data, inputs = REFUSED[name]
    told: queue.Queue[Any] = queue.Queue()
    with (
        serving(tmp_path, image_limits=ImageLimits(max_pixels=64 * 64)) as (server, _),
        client_of(server) as client,
        no_collection(),
    ):
        if stream:
            client.start_stream(lambda result, error: told.put(error))
        for _ in range(3):
            if stream:
                client.async_stream_infer("m", [image_input(data), *inputs])
                assert told.get(timeout=120) is not None
            else:
                refused(lambda: client.infer("m", [image_input(data), *inputs]))
        # A response is sent before the last frames return; a later request finds them freed.
        assert client.infer("m", [image_input()], parameters={"num_inference_steps": 2})
        assert held() == []


class Talkative:
    """A fake Inference with several responses per request."""

    async def stream(self, request: Any, context: Any) -> AsyncGenerator[tuple[Any, bool], None]:
        for step in range(4):
            yield service_pb2.ModelInferResponse(id=request.id), step == 3


@pytest.mark.parametrize("broken", [False, True])
async def test_ended_stream_frees_its_unread_responses(broken: bool) -> None:
    """Whether its caller disconnected, or its message cannot be parsed."""

    async def requests() -> AsyncIterator[Any]:
        for name in "abc":
            yield service_pb2.ModelInferRequest(id=name)
        if broken:
            raise InvalidField("id", "broken")
        await asyncio.Event().wait()

    with no_collection(), answering(Call("m", "r")):
        access, telemetry, inference = Access(), Telemetry(TelemetrySettings()), Talkative()
        stream = request_stream(inference, access, telemetry, CallContext())  # type: ignore[arg-type]
        responses = stream.responses(requests())
        del stream
        await anext(responses)
        await responses.aclose()
        await asyncio.sleep(0)  # what woke this up is let go of by the event loop
        assert [each for each in gc.get_objects() if type(each) is RequestStream] == []
        assert len(asyncio.all_tasks()) == 1, "this one"


async def test_large_tensor_is_parsed_off_the_event_loop() -> None:
    """Each value of this message is a separate number."""
    request = service_pb2.ModelInferRequest(model_name="m")
    tensor = request.inputs.add(name="image_pixels", datatype="UINT8", shape=[64, 64, 3])
    tensor.contents.uint_contents.extend([0] * (64 * 64 * 3 - 1) + [256])
    others = asyncio.Event()
    asyncio.get_running_loop().call_soon(others.set)
    with pytest.raises(InvalidField, match="image_pixels: "):
        await translation.read(request, FairThreads(1, "test"))
    assert others.is_set(), "had their turn while it was read"

"""The budget of memory for images: which calls are refused, and that memory is released."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from asset_calls import noise, upload
from fakes import FakePipeline
from grpc_health.v1 import health_pb2, health_pb2_grpc
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1 import model_pb2
from img2img.v1.asset_pb2_grpc import AssetServiceStub
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img.v1.model_pb2_grpc import ModelServiceStub
from img2img_server.codecs.pool import ImageMemory
from img2img_server.config import CodecSettings
from img2img_server.errors import ImageMemoryFull
from img2img_server.images import ImageLimits
from img2img_server.support.call import Call
from messages import failure, request
from running import RunningServer, running, store
from soak_parts.image_bombs import BOMBS


def call(client: str, request_id: str = "i") -> Call:
    return Call("m", request_id, client=client)


def test_one_client_gets_at_most_half_of_the_image_memory() -> None:
    memory = ImageMemory(100)
    with ExitStack() as held:
        calls = [call("a") for _ in range(3)]
        held.enter_context(memory.hold(calls[0], 30))
        held.enter_context(memory.hold(calls[1], 20))
        for size in (1, 50):
            with pytest.raises(ImageMemoryFull), memory.hold(calls[2], size):
                pytest.fail("it is more than half")
        held.enter_context(memory.hold(call("b"), 50))
        with pytest.raises(ImageMemoryFull) as refused, memory.hold(call("c"), 1):
            pytest.fail("it is more than there is")
        with memory.hold(call("c"), 0):
            assert memory.held == 100, "what takes nothing is never refused"
        assert refused.value.retry_after
        assert memory.held == 100
    assert (memory.held, memory.refused) == (0, 3)
    assert not memory._of_calls
    assert not memory._of_clients


def test_single_call_may_exceed_the_image_memory() -> None:
    memory = ImageMemory(100)
    alone, other = call("a"), call("a")
    with memory.hold(alone, 80), memory.hold(alone, 500):
        with pytest.raises(ImageMemoryFull), memory.hold(other, 1):
            pytest.fail("a call with the same id is another one")
        with memory.hold(alone, 0):
            assert memory.held == 580
    assert memory.held == 0


class Blocked(FakePipeline):
    """A pipeline whose first call waits until `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.go = threading.Event(), threading.Event()
        self.before_call = self._wait

    def _wait(self) -> None:
        self.called.set()
        assert self.go.wait(60)


@pytest.fixture
def blocked() -> Iterator[Blocked]:
    made = Blocked()
    yield made
    made.go.set()


def connect(server: RunningServer) -> grpc.Channel:
    return grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.max_send_message_length", -1)])


BIG = noise((700, 700))


@pytest.mark.parametrize(
    "ask",
    [
        lambda channel: ImageToImageServiceStub(channel).Transform(request(image={"data": BIG})),
        lambda channel: list(
            ImageToImageServiceStub(channel).TransformStream(pb.TransformStreamRequest(request=request(image={"data": BIG})))
        ),
        lambda channel: upload(AssetServiceStub(channel), BIG),
        lambda channel: ImageToImageServiceStub(channel).Transform(request()),
    ],
    ids=["transform", "stream", "upload", "decoding"],
)
def test_full_image_memory_refuses_only_images(blocked: Blocked, ask: Callable[[Any], object]) -> None:
    with running(lambda: store(m=blocked), codecs=CodecSettings(memory=2 * len(BIG))) as server, connect(server) as channel:
        first = ImageToImageServiceStub(channel).Transform.future(request(image={"data": BIG}))
        assert blocked.called.wait(60)
        memory = server.server._memory
        assert memory.held >= len(BIG), "its message is there until its answer is"
        with connect(server) as second:
            code, details = failure(lambda: ask(second))
            assert (code, details["reason"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "IMAGE_MEMORY_FULL")
            assert float(str(details["retry"])) > 0
            health: Any = health_pb2_grpc.HealthStub(second)
            assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
            assert ModelServiceStub(second).ListModels(model_pb2.ListModelsRequest()).models
            blocked.go.set()
            assert first.result(60).images
            assert ask(second)
        asyncio.run_coroutine_threadsafe(server.server._codecs._decoders._slots.settle(), server.loop).result(60)
        assert memory.held == 0


@pytest.mark.parametrize("name", BOMBS)
def test_a_server_refuses_bombs_in_requests_and_uploads(bombed: grpc.Channel, name: str) -> None:
    data = BOMBS[name]()
    code, details = failure(lambda: ImageToImageServiceStub(bombed).Transform(request(image={"data": data})))
    assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "image.data")
    code, details = failure(lambda: upload(AssetServiceStub(bombed), data))
    assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "chunk")


@pytest.fixture(scope="module")
def bombed() -> Iterator[grpc.Channel]:
    with running(lambda: store(m=FakePipeline()), image_limits=ImageLimits()) as server, connect(server) as channel:
        yield channel
        processes = server.server._codecs._decoders._all
        assert len(processes) == 1, "no bomb ended a process, or needed another"
        assert server.server._memory.held == 0

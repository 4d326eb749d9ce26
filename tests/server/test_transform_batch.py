"""TransformBatch: many requests in one call. Each has its own outcome, and waits if a single call would be refused."""

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fakes import FakePipeline
from google.rpc import code_pb2, error_details_pb2, status_pb2
from granting import bearing, grant
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server.access.access import Access
from img2img_server.api import request_stream
from img2img_server.api.request_stream import RequestStream
from img2img_server.codecs.pool import ImageMemory
from img2img_server.config import TelemetrySettings
from img2img_server.engine.engine import Engine
from img2img_server.engine.interface import Accepted
from img2img_server.engine.request import Request
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.errors import DeadlineExpired, QueueFull
from img2img_server.telemetry.telemetry import Telemetry
from messages import CallContext, failure, request
from running import RunningServer, running, store

METHOD = "/img2img.v1.ImageToImageService/TransformBatch"


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def server(pipeline: FakePipeline) -> Iterator[RunningServer]:
    limits = QueueLimits(max_active=2, max_batch_size=2, max_waiting=2, max_client_waiting=2)
    with running(lambda: store(m=pipeline), limits=limits) as server:
        yield server


@pytest.fixture
def stub(server: RunningServer) -> Iterator[ImageToImageServiceStub]:
    with grpc.insecure_channel(f"localhost:{server.port}") as channel:
        yield ImageToImageServiceStub(channel)


def asked(**fields: object) -> pb.TransformBatchRequest:
    return pb.TransformBatchRequest(request=request(**{"num_inference_steps": 2, "strength": 1.0, **fields}))


def run(
    stub: ImageToImageServiceStub, *requests: pb.TransformBatchRequest, **call: object
) -> dict[int, pb.TransformBatchResponse]:
    """The outcomes by index. Each request has one."""
    responses = list(stub.TransformBatch(iter(requests), timeout=60, **call))  # type: ignore[arg-type]
    found = {response.index: response for response in responses}
    assert len(found) == len(responses)
    return found


def test_batch_larger_than_the_queue_completes(stub: ImageToImageServiceStub, pipeline: FakePipeline) -> None:
    found = run(stub, *(asked(seed=seed) for seed in range(40)))
    assert [found[index].response.images[0].seed for index in range(40)] == list(range(40))
    assert len(pipeline.prepared) == 40


def test_results_are_sent_in_completion_order(
    stub: ImageToImageServiceStub, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The long one takes no step before the engine has the short one."""
    submit, arrived = Engine.submit, threading.Event()

    def watched(engine: Engine, request: Request, *arguments: Any, **named: Any) -> Accepted:
        accepted = submit(engine, request, *arguments, **named)
        if request.num_inference_steps == 1:
            arrived.set()
        return accepted

    monkeypatch.setattr(Engine, "submit", watched)
    answered = threading.Event()

    def held() -> None:
        arrived.wait(120)
        if any(state.request.num_inference_steps == 1 for state in pipeline.released):
            answered.wait(120)

    pipeline.before_call = held
    responses = stub.TransformBatch(iter([asked(num_inference_steps=100), asked(num_inference_steps=1)]), timeout=120)
    first = next(responses).index
    answered.set()
    assert [first, *(response.index for response in responses)] == [1, 0]


def test_failed_request_names_its_field_and_does_not_end_the_call(stub: ImageToImageServiceStub) -> None:
    found = run(
        stub,
        asked(strength=2.0),
        asked(),
        asked(model=pb.ModelReference(path="none")),
        asked(prompt="fail denoise"),
        asked(image=pb.ImageSource(data=b"no image")),
        metadata=(("x-request-id", "mine"),),
    )
    assert found[1].HasField("response")
    told = {index: status_pb2.Status.FromString(found[index].status) for index in (0, 2, 3, 4)}
    assert {index: code_pb2.Code.Name(status.code) for index, status in told.items()} == {
        0: "INVALID_ARGUMENT", 2: "NOT_FOUND", 3: "INTERNAL", 4: "INVALID_ARGUMENT"
    }  # fmt: skip
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert told[0].details[0].Unpack(info)
    assert (info.reason, info.metadata["request_id"]) == ("INVALID_FIELD", "mine-1")
    assert told[0].details[1].Unpack(bad)
    assert bad.field_violations[0].field == "strength"


def test_no_requests_have_no_results(stub: ImageToImageServiceStub) -> None:
    assert run(stub) == {}


def test_unparsable_message_ends_the_call_after_earlier_results(server: RunningServer) -> None:
    with grpc.insecure_channel(f"localhost:{server.port}") as channel:
        method: Any = channel.stream_stream(METHOD, None, pb.TransformBatchResponse.FromString)
        responses = method(iter([asked().SerializeToString(), b"\xff\xff", asked().SerializeToString()]), timeout=60)
        assert next(responses).index == 0
        code, details = failure(lambda: next(responses))
    assert (code, details["reason"]) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")


async def test_requests_are_read_only_as_earlier_ones_complete() -> None:
    free, read = asyncio.Event(), 0

    async def requests() -> AsyncIterator[int]:
        nonlocal read
        for number in range(20):
            read += 1
            yield number

    async def respond(request: int, number: int) -> AsyncGenerator[tuple[int, bool], None]:
        await free.wait()
        yield request, True

    telemetry = Telemetry(TelemetrySettings())
    stream = RequestStream(METHOD, respond, lambda *failure: failure, Access(None), telemetry, CallContext(), in_progress=4)
    responses = stream.responses(requests())
    first = asyncio.ensure_future(anext(responses))
    for _ in range(100):  # everything that can continue without a response does
        await asyncio.sleep(0)
    assert read == 4
    free.set()
    assert sorted([await first, *[response async for response in responses]]) == list(range(20))


def test_concurrent_batches_per_client_are_limited(server: RunningServer, stub: ImageToImageServiceStub) -> None:
    """Their requests wait where others are refused, so calls must not pile up."""
    ending = threading.Event()

    def requests() -> Iterator[pb.TransformBatchRequest]:
        yield asked()
        ending.wait(60)

    held = [stub.TransformBatch(requests(), timeout=60) for _ in range(8)]
    for call in held:
        assert next(call).index == 0
    code, details = failure(lambda: run(stub, asked()))
    assert (code, details["reason"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CLIENT_QUEUE_FULL")
    ending.set()
    for call in held:
        assert list(call) == []
    assert run(stub, asked())[0].HasField("response")


async def test_idle_batch_call_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_stream, "IDLE_SECONDS", 0.05)

    async def requests() -> AsyncIterator[pb.TransformBatchRequest]:
        yield asked()
        await asyncio.Event().wait()

    async def respond(request: Any, number: int) -> AsyncGenerator[tuple[int, bool], None]:
        yield number, True

    stream = RequestStream(
        METHOD, respond, lambda *failure: failure, Access(None), Telemetry(TelemetrySettings()), CallContext(),
        in_progress=4, memory=ImageMemory(10_000),
    )  # fmt: skip
    responses = stream.responses(requests())
    assert await anext(responses) == 0
    with pytest.raises(DeadlineExpired, match="no request"):
        await anext(responses)


async def test_waiting_messages_count_towards_memory() -> None:
    memory, full = ImageMemory(10_000), asyncio.Event()
    message = asked(prompt="x" * 4000)

    async def requests() -> AsyncIterator[pb.TransformBatchRequest]:
        for _ in range(2):
            yield message

    async def respond(request: Any, number: int) -> AsyncGenerator[tuple[int, bool], None]:
        if not full.is_set():
            raise QueueFull("no", 0.1)
        yield number, True

    stream = RequestStream(
        METHOD, respond, lambda *failure: failure, Access(None), Telemetry(TelemetrySettings()), CallContext(),
        in_progress=4, memory=memory,
    )  # fmt: skip
    responses = stream.responses(requests())
    first = asyncio.ensure_future(anext(responses))
    for _ in range(100):
        await asyncio.sleep(0)
    assert memory.held == 2 * message.ByteSize()
    full.set()
    assert sorted([await first, *[response async for response in responses]]) == [0, 1]
    assert memory.held == 0


def test_disconnecting_cancels_running_requests(
    server: RunningServer, stub: ImageToImageServiceStub, pipeline: FakePipeline
) -> None:
    begun = threading.Event()
    pipeline.before_call = begun.set
    call = stub.TransformBatch(iter([asked(num_inference_steps=100) for _ in range(10)]), timeout=60)
    assert begun.wait(30)
    call.cancel()
    wait_until(lambda: len(pipeline.released) == len(pipeline.prepared) > 0)
    assert run(stub, asked())[0].HasField("response"), "the queue is free again"


def test_each_request_counts_against_its_token(tmp_path: Path, pipeline: FakePipeline) -> None:
    tokens = tmp_path / "tokens.toml"
    secret = grant(tokens, "one", concurrency=1, models=("m",))
    most = 0

    def count() -> None:
        nonlocal most
        most = max(most, len(pipeline.prepared) - len(pipeline.released))

    pipeline.before_call = count
    load = lambda: store(m=pipeline, other=FakePipeline())  # noqa: E731
    with running(load, tokens=tokens) as server, grpc.insecure_channel(f"localhost:{server.port}") as channel:
        stub = ImageToImageServiceStub(channel)
        found = run(
            stub, *(asked(seed=seed) for seed in range(4)), asked(model=pb.ModelReference(path="other")), metadata=bearing(secret)
        )
        code, _ = failure(lambda: run(stub, asked()))
    assert [found[index].HasField("response") for index in range(5)] == [True] * 4 + [False]
    assert most == 1
    assert code == grpc.StatusCode.UNAUTHENTICATED
    assert status_pb2.Status.FromString(found[4].status).code == code_pb2.PERMISSION_DENIED


def wait_until(holds: object) -> None:
    assert callable(holds)
    for _ in range(3000):
        if holds():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come to pass")

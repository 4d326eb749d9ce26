"""A refused request leaves nothing behind: an image that hung on until Python looks for cycles would be 100 MB a request."""

import contextlib
import ctypes
import gc
import logging
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from cycles import no_collection
from fakes import FakePipeline
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server.api import transport
from img2img_server.backends.local import LocalBackend
from img2img_server.config import ModelSettings, ServerConfig
from img2img_server.images import ImageLimits
from img2img_server.models.registry import ModelRegistry
from messages import failure, png, request
from PIL import Image
from running import running, running_backend, store
from soak_parts.hostile import UNARY
from soak_parts.raw_http2 import HEADERS, RESET, RawConnection
from soak_parts.stand_in import plant

SIDE = 1032
MESSAGE = 2**21
"""Bytes."""


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"width": SIDE, "height": SIDE - 8}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"width": 4}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"width": 16, "height": 16, "prompt": "fail prepare"}, grpc.StatusCode.INTERNAL),
        ({"width": 16, "height": 16, "prompt": "fail finish"}, grpc.StatusCode.INTERNAL),
        ({"width": 16, "height": 16, "strength": 5.0}, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_requests_image_is_freed_at_once(fields: dict[str, object], code: grpc.StatusCode, stream: bool) -> None:
    limits, message = ImageLimits(max_pixels=64 * 64), request(image=pb.ImageSource(data=png((SIDE, SIDE))), **fields)
    with (
        running(lambda: store(m=FakePipeline()), image_limits=limits) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        no_collection(),
    ):
        stub = ImageToImageServiceStub(channel)
        call: Callable[[], object] = lambda: stub.Transform(message)  # noqa: E731
        if stream:
            call = lambda: list(stub.TransformStream(pb.TransformStreamRequest(request=message)))  # noqa: E731
        for _ in range(3):
            assert failure(call)[0] is code
        # A response is sent before the last frames return; a later request finds them freed.
        assert failure(lambda: stub.Transform(request(strength=2.0)))[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert [each for each in gc.get_objects() if issubclass(type(each), Image.Image) and each.width == SIDE] == []


@pytest.mark.parametrize("fields", [{}, {"strength": 2.0}, {"image": pb.ImageSource(data=bytes(MESSAGE))}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_calls_message_is_freed_with_the_call(fields: dict[str, object], stream: bool) -> None:
    """Whether the call is answered or refused."""
    message = request(**{"image": pb.ImageSource(data=png((16, 16)) + bytes(MESSAGE)), **fields})
    with (
        running(lambda: store(m=FakePipeline())) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        no_collection(),
    ):
        stub = ImageToImageServiceStub(channel)

        def call() -> None:
            with contextlib.suppress(grpc.RpcError):
                list(stub.TransformStream(pb.TransformStreamRequest(request=message))) if stream else stub.Transform(message)

        call()
        tracemalloc.start()
        try:
            for _ in range(8):
                call()
            assert failure(lambda: stub.Transform(request(strength=2.0)))[0] is grpc.StatusCode.INVALID_ARGUMENT
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert held < 2 * MESSAGE


def test_requests_that_share_an_error_are_freed_one_by_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They share the error, whose traceback has the frames of each; one request's frames are still sending when the next
    arrives."""
    failing, backends = threading.Event(), list[LocalBackend]()

    def load(bundle: Path, manifest: object) -> FakePipeline:
        assert failing.wait(120)
        raise OSError("told to fail")

    def make(config: ServerConfig) -> LocalBackend:
        backends.append(LocalBackend(config, lambda: ModelRegistry.load(tmp_path, load, settings=config.residency)))
        return backends[0]

    plant(tmp_path, "m")
    with (
        running_backend(make, residency=ModelSettings(preload=("none",))) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        calls = [ImageToImageServiceStub(channel).Transform.future(request()) for _ in range(4)]
        while backends[0].runner.stats.arriving < 4:
            assert not any(call.done() for call in calls)
            time.sleep(0.01)
        failing.set()
        assert {failure(call.result)[1]["reason"] for call in calls} == {"MODEL_UNAVAILABLE"}
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


CHECK = "/grpc.health.v1.Health/Check"
CANCEL = (8).to_bytes(4, "big")
RESETS = 1000
MOST_BYTES = 100
"""Bytes of native memory per call: buffers grow a little, independent of the number of calls."""


class MallInfo(ctypes.Structure):
    """glibc's mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def native_bytes() -> int:
    """Bytes that malloc has given out and not got back."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallInfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


@pytest.fixture
def without_log() -> Iterator[None]:
    """pytest keeps the log, which would grow with the calls."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def sent_and_reset(port: int, message: bytes) -> None:
    """Calls that are reset as soon as they are sent, 50 on a connection."""
    with RawConnection(port) as connection:
        for stream in range(1, 101, 2):
            connection.call(UNARY, *([message] if message else []), stream=stream)
            connection.send(RESET, CANCEL, stream=stream)


def answered_and_reset(port: int, message: bytes) -> None:
    """Calls that are reset while their responses are being sent: the client's window is full."""
    with RawConnection(port, window=0) as connection:
        for stream in range(1, 101, 2):
            connection.call(CHECK, message, stream=stream)
        for _ in zip(range(50), (frame for frame in connection.frames() if frame.kind == HEADERS), strict=False):
            pass
        for stream in range(1, 101, 2):
            connection.send(RESET, CANCEL, stream=stream)


@pytest.mark.usefixtures("without_log")
@pytest.mark.parametrize(
    ("attack", "message", "unread"),
    [
        (sent_and_reset, b"", 16),
        pytest.param(sent_and_reset, b"\xff", 16, marks=pytest.mark.nightly),
        pytest.param(sent_and_reset, pb.TransformRequest(prompt="x").SerializeToString(), 16, marks=pytest.mark.nightly),
        pytest.param(sent_and_reset, b"", 0, marks=pytest.mark.nightly),
        (answered_and_reset, b"", 16),
    ],
    ids=["without a message", "malformed", "invalid", "refused before its message", "answered"],
)
def test_calls_reset_by_the_client_leak_no_memory(
    attack: Callable[[int, bytes], None], message: bytes, unread: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "MAX_CLIENT_UNREAD", unread)

    def reset() -> None:
        for _ in range(RESETS // 50):
            attack(server.port, message)
        # Answered after those before it have been dealt with.
        for _ in range(20):
            with pytest.raises(grpc.RpcError):
                stub.Transform(request(strength=2.0))
        gc.collect()

    with (
        running(lambda: store(m=FakePipeline())) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub = ImageToImageServiceStub(channel)
        reset()
        before = native_bytes()
        reset()
        reset()
        assert native_bytes() - before < 2 * RESETS * MOST_BYTES

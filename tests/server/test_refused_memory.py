"""A refused request leaves nothing behind: a picture that hung on until Python looks for cycles would be 100 MB a request."""

import contextlib
import gc
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from cycles import no_collection
from fakes import FakePipeline
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server.backend import LocalBackend
from img2img_server.config import ModelSettings, ServerConfig
from img2img_server.images import ImageLimits
from img2img_server.models.store import ModelStore
from messages import failure, png, request
from PIL import Image
from running import running, running_backend, store
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
def test_a_refused_requests_picture_is_freed_at_once(fields: dict[str, object], code: grpc.StatusCode, stream: bool) -> None:
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
        # An answer is sent before the last frames are left: one that comes after it finds them gone.
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


def test_those_who_are_refused_for_the_same_reason_are_let_go_one_by_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They share the error, whose trace has the frames of each; and those of one are busy with its answer when the next comes."""
    failing, backends = threading.Event(), list[LocalBackend]()

    def load(bundle: Path, manifest: object) -> FakePipeline:
        assert failing.wait(30)
        raise OSError("told to fail")

    def make(config: ServerConfig) -> LocalBackend:
        backends.append(LocalBackend(config, lambda: ModelStore.load(tmp_path, load, settings=config.residency)))
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

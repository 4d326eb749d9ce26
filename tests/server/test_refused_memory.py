"""A refused request leaves nothing behind: a picture that hung on until Python looks for cycles would be 100 MB a request."""

import contextlib
import gc
from collections.abc import Callable, Iterator

import grpc
import pytest
from fakes import FakePipeline
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server.images import ImageLimits
from messages import failure, png, request
from PIL import Image
from running import running, store

SIDE = 1032


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Cycles are not looked for within the block."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


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

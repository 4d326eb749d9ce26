"""Messages of the contract for tests, and the details of a failed call's status."""

import io
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from img2img.v1 import image_to_image_pb2 as pb
from PIL import Image


def png(size: tuple[int, int] = (24, 16)) -> bytes:
    """The file of a plain image."""
    file = io.BytesIO()
    Image.new("RGB", size, "teal").save(file, "PNG")
    return file.getvalue()


def request(**fields: Any) -> pb.TransformRequest:
    """A transform of a plain image with seed 5, and what else is asked."""
    return pb.TransformRequest(**{"image": pb.ImageSource(data=png()), "seed": 5, **fields})


def content(response: pb.TransformResponse) -> list[tuple[int, bytes]]:
    """The seed and the pixels of each image: a PNG file of the same pixels may have other bytes."""
    return [(image.seed, Image.open(io.BytesIO(image.data)).tobytes()) for image in response.images]


def failure(call: Callable[[], object]) -> tuple[grpc.StatusCode, dict[str, object]]:
    """The status code of a call that must fail, and its details by name: message, reason, field, description, retry."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    found: dict[str, object] = {"message": error.details()}
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            assert info.domain == "img2img"
            found["reason"] = info.reason
        elif detail.Unpack(bad):
            (violation,) = bad.field_violations
            found |= {"field": violation.field, "description": violation.description}
        elif detail.Unpack(retry):
            found["retry"] = retry.retry_delay.ToTimedelta().total_seconds()
    return error.code(), found


class CallContext:
    """The part of gRPC's context that a stream of requests uses."""

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:4711"

    def time_remaining(self) -> None:
        return None

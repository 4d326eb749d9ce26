"""Sends raw bytes to every RPC of the server and checks its answers."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status
from img2img.v1 import asset_pb2, image_to_image_pb2, model_pb2

DOCUMENTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.PERMISSION_DENIED,
}
"""Allowed statuses for any input. INTERNAL and UNKNOWN are bugs, DEADLINE_EXCEEDED is a hang."""
FILES = (image_to_image_pb2, model_pb2, asset_pb2, health_pb2, reflection_pb2)
METHODS: list[MethodDescriptor] = [
    method for file in FILES for service in file.DESCRIPTOR.services_by_name.values() for method in service.methods
]
SECONDS = 30.0
"""Seconds within which every call must be answered."""
SECRET = "planted-secret"
"""A word in the server's paths that no answer may contain."""
MOST_TEXT = 2_000
"""Maximum characters of an error message: it is sent in a trailer, whose size gRPC limits."""


class Finding(AssertionError):
    """An answer that violates a rule; the message says which."""


def name_of(method: MethodDescriptor) -> str:
    """The method's name with its service, such as "ImageToImageService.Transform"."""
    return f"{method.containing_service.name}.{method.name}"


def send(channel: grpc.Channel, method: MethodDescriptor, messages: Sequence[bytes]) -> tuple[grpc.StatusCode, Any]:
    """Sends raw bytes as the messages of a call. Returns the status and the error, if any.

    An endless stream (a watch) is cancelled after its first answer.
    """
    path = f"/{method.containing_service.full_name}/{method.name}"
    arity = ("stream" if method.client_streaming else "unary", "stream" if method.server_streaming else "unary")
    start: Any = getattr(channel, "_".join(arity))(path)
    try:
        call = start(iter(messages) if method.client_streaming else messages[0], timeout=SECONDS)
        if method.server_streaming:
            list(itertools.islice(call, 1) if method.name == "Watch" else call)
            call.cancel()
    except grpc.RpcError as error:
        caught: Any = error
        return caught.code(), caught
    return grpc.StatusCode.OK, None


def check(method: MethodDescriptor, code: grpc.StatusCode, error: Any, messages: Sequence[bytes]) -> None:
    """Checks an answer against the documentation. Raises Finding."""
    _require(code in DOCUMENTED, f"{code.name}: {error.details() if error else ''}")
    if error is None:
        return
    text = error.details()
    _require(len(text) <= MOST_TEXT, f"the error's text has {len(text)} characters")
    for secret in (SECRET, "Traceback", ".py", "site-packages"):
        quoted = any(secret.encode() in data for data in messages)
        _require(secret not in text or quoted, f"the error reveals a detail of the server: {text}")
    if method.containing_service.full_name.startswith("img2img"):
        _check_details(method, rpc_status.from_call(error))


def _check_details(method: MethodDescriptor, status: Any) -> None:
    _require(status is not None, "the error has no details")
    found = {detail.type_url.rpartition(".")[2]: detail for detail in status.details}
    _require("ErrorInfo" in found, "the error has no ErrorInfo")
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    found["ErrorInfo"].Unpack(info)
    _require(info.domain == "img2img" and bool(info.reason) and bool(info.metadata["request_id"]), f"ErrorInfo is {info}")
    _require(("BadRequest" in found) == (info.reason == "INVALID_FIELD"), f"unexpected details of {info.reason}")
    if "BadRequest" not in found:
        return
    found["BadRequest"].Unpack(bad)
    _require(len(bad.field_violations) == 1, "BadRequest does not have exactly one violation")
    (violation,) = bad.field_violations
    _require(0 < len(violation.description) <= MOST_TEXT, "the description is empty or too long")
    # A field of the message, or of the transform in it.
    owners = (method.input_type, image_to_image_pb2.TransformRequest.DESCRIPTOR)
    _require(any(has_field(owner, violation.field) for owner in owners), f"'{violation.field}' is not a field")


def has_field(descriptor: Descriptor, path: str) -> bool:
    """Whether a path such as "image.data" or "loras[0].id" names a field of the message."""
    first, _, rest = path.partition(".")
    element = re.fullmatch(r"(\w+)\[\d+\]", first)
    field = descriptor.fields_by_name.get(element[1] if element else first)
    if field is None or (element and not field.is_repeated):
        return False
    return not rest or (field.message_type is not None and has_field(field.message_type, rest))


def _require(condition: bool, why: str) -> None:
    if not condition:
        raise Finding(why)


def is_unchanged(folder: Path) -> bool:
    """Whether `folder` contains only the server's folders, "models" and "assets"."""
    return {path.name for path in folder.iterdir()} <= {"models", "assets"}

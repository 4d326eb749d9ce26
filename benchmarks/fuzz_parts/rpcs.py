"""Every RPC that the server answers, how to send it raw bytes, and what its answer must look like whatever they were."""

import itertools
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
"""What a caller who sends nonsense may get. Not INTERNAL or UNKNOWN, which are bugs; not DEADLINE_EXCEEDED, which is a hang."""
FILES = (image_to_image_pb2, model_pb2, asset_pb2, health_pb2, reflection_pb2)
METHODS: list[MethodDescriptor] = [
    method for file in FILES for service in file.DESCRIPTOR.services_by_name.values() for method in service.methods
]
SECONDS = 30.0
"""Within which every call is answered."""
SECRET = "planted-secret"
"""A word in the server's paths that no answer may have."""
MOST_TEXT = 2_000
"""Characters of an error's text: it is sent in a trailer, which gRPC bounds, whatever it quotes."""


class Finding(AssertionError):
    """An answer that breaks a rule. The message says which."""


def name_of(method: MethodDescriptor) -> str:
    """Such as "ImageToImageService.Transform"."""
    return f"{method.containing_service.name}.{method.name}"


def send(channel: grpc.Channel, method: MethodDescriptor, messages: Sequence[bytes]) -> tuple[grpc.StatusCode, Any]:
    """Sends raw bytes as a call's messages. Returns the status, and the error where there is one.

    A stream that goes on for ever, a watch, is left after its first answer.
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
    """Holds an answer to what is documented of answers. Raises Finding."""
    _hold(code in DOCUMENTED, f"{code.name}: {error.details() if error else ''}")
    if error is None:
        return
    text = error.details()
    _hold(len(text) <= MOST_TEXT, f"the error's text has {len(text)} characters")
    for secret in (SECRET, "Traceback", ".py", "site-packages"):
        quoted = any(secret.encode() in data for data in messages)
        _hold(secret not in text or quoted, f"the error tells of the server: {text}")
    if method.containing_service.full_name.startswith("img2img"):
        _check_details(method, rpc_status.from_call(error))


def _check_details(method: MethodDescriptor, status: Any) -> None:
    _hold(status is not None, "an error without details")
    found = {detail.type_url.rpartition(".")[2]: detail for detail in status.details}
    _hold("ErrorInfo" in found, "an error without ErrorInfo")
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    found["ErrorInfo"].Unpack(info)
    _hold(info.domain == "img2img" and bool(info.reason) and bool(info.metadata["request_id"]), f"ErrorInfo is {info}")
    _hold(("BadRequest" in found) == (info.reason == "INVALID_FIELD"), f"{info.reason}, and BadRequest or none")
    if "BadRequest" not in found:
        return
    found["BadRequest"].Unpack(bad)
    _hold(len(bad.field_violations) == 1, "several fields, or none")
    (violation,) = bad.field_violations
    _hold(0 < len(violation.description) <= MOST_TEXT, "no description, or a long one")
    # Of the message itself, or of the transform that is in it.
    owners = (method.input_type, image_to_image_pb2.TransformRequest.DESCRIPTOR)
    _hold(any(has_field(owner, violation.field) for owner in owners), f"'{violation.field}' is no field")


def has_field(descriptor: Descriptor, path: str) -> bool:
    """Whether "image.data" and the like names a field of the message."""
    name, _, rest = path.partition(".")
    field = descriptor.fields_by_name.get(name)
    return field is not None and (not rest or (field.message_type is not None and has_field(field.message_type, rest)))


def _hold(holds: bool, why: str) -> None:
    if not holds:
        raise Finding(why)


def is_left_alone(folder: Path) -> bool:
    """Whether the server wrote nothing beside its folders: "models" and "assets" in `folder`."""
    return {path.name for path in folder.iterdir()} <= {"models", "assets"}

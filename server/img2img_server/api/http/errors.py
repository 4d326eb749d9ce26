"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}, with the HTTP status of the gRPC code."""

import json
import math
from typing import Any

from img2img_server.errors import DeadlineUnmeetable, Exhausted, InvalidField, MessageTooLarge, ModelNotFound, ServerError

_STATUSES = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""HTTP's status by gRPC's, as google.rpc.Code maps them (google/rpc/code.proto)."""
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_MAX_TEXT = 2000
_FIELDS = {
    "model": "model",
    "loras": "loras",
    "fidelity": "fidelity",
    "image": "image",
    "mask": "mask",
    "reference_images": "image",
    "image_count": "n",
    "width": "size",
    "height": "size",
    "fit": "size",
    "output.format": "output_format",
    "output.quality": "output_compression",
    "output.as_asset": "response_format",
}
"""Fields of TransformRequest -> fields of the form. `image`, `mask`, `loras`, `fidelity` and `model` include their subfields."""


class PathNotFound(ServerError):
    """The server has no such path."""

    status = "NOT_FOUND"
    reason = "PATH_NOT_FOUND"


class MethodNotAllowed(ServerError):
    """The path does not support this method. `allowed` lists the methods that it supports."""

    status = "UNIMPLEMENTED"
    reason = "METHOD_NOT_ALLOWED"

    def __init__(self, allowed: str) -> None:
        super().__init__(f"this path only supports {allowed}")
        self.allowed = allowed


_OWN: dict[type[ServerError], int] = {MessageTooLarge: 413, MethodNotAllowed: 405}
"""Errors with a more specific HTTP status than that of their gRPC code."""


def status_of(error: ServerError) -> int:
    """The HTTP status of an error."""
    return _OWN.get(type(error)) or _STATUSES[error.status]


def object_of(error: ServerError) -> dict[str, Any]:
    """The object "error" of a response: `code` is the error's stable reason, `param` the invalid field."""
    status, param, text = status_of(error), None, str(error)
    if isinstance(error, InvalidField):
        param = _FIELDS.get(error.field) or _FIELDS.get(error.root, error.field)
        text = f"{param}: {error.description}"
    if isinstance(error, ModelNotFound):
        param = "model"
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    if len(text) > _MAX_TEXT:
        text = f"{text[:_MAX_TEXT]}..."
    return {"message": text, "type": kind, "param": param, "code": error.reason}


def body_of(error: ServerError) -> bytes:
    """The body of an error response."""
    return json.dumps({"error": object_of(error)}).encode()


def headers_of(error: ServerError) -> dict[str, str]:
    """The headers of an error response. OpenAI's clients follow `x-should-retry`."""
    headers = {"x-should-retry": "true" if is_transient(error) else "false"}
    if isinstance(error, Exhausted) and error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))
        headers["retry-after-ms"] = str(math.ceil(error.retry_after * 1000))
    if isinstance(error, DeadlineUnmeetable):
        headers["x-img2img-estimate-ms"] = str(math.ceil(error.estimate * 1000))
    if isinstance(error, MethodNotAllowed):
        headers["allow"] = error.allowed
    if error.status == "UNAUTHENTICATED":
        headers["www-authenticate"] = "Bearer"
    return headers


def is_transient(error: ServerError) -> bool:
    """Whether the same request may succeed later, by the rule of img2img's own clients."""
    return error.status == "UNAVAILABLE" or (isinstance(error, Exhausted) and error.retry_after is not None)

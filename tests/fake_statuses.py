"""The gRPC statuses with which an img2img server refuses calls."""

from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped, unused-ignore]
from grpc_status import rpc_status


def rich_status(code: int, message: str, *details: Message) -> grpc.Status:
    """A status as an img2img server sends it."""
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return rpc_status.to_status(status_pb2.Status(code=code, message=message, details=packed))


def error_info(reason: str, domain: str = "img2img", **metadata: str) -> error_details_pb2.ErrorInfo:
    """The detail that gives a reason."""
    return error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=metadata)


def wrong_field(field: str, description: str) -> grpc.Status:
    """The server's response to a wrong field."""
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
    bad_request = error_details_pb2.BadRequest(field_violations=[violation])
    return rich_status(code_pb2.INVALID_ARGUMENT, f"{field}: {description}", error_info("INVALID_FIELD"), bad_request)


def queue_full(retry_after: float) -> grpc.Status:
    """The server's response if its queue is full."""
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(round(retry_after * 1000))
    retry = error_details_pb2.RetryInfo(retry_delay=delay)
    return rich_status(code_pb2.RESOURCE_EXHAUSTED, "the queue is full", error_info("QUEUE_FULL"), retry)


def unavailable() -> grpc.Status:
    """The server's response while it drains."""
    return rich_status(code_pb2.UNAVAILABLE, "shutting down", error_info("SHUTTING_DOWN"))


def abort(context: Any, status: grpc.Status) -> NoReturn:
    """Ends the call with a rich status."""
    context.abort_with_status(status)
    raise AssertionError("abort_with_status raises")

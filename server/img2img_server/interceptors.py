"""Errors -> rich statuses, once for every call. What is not meant for callers stays in the log."""

import inspect
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from img2img_server.errors import DeadlineUnmeetable, InvalidField, QueueFull, ServerError

_log = logging.getLogger(__name__)

DOMAIN = "img2img"


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns the errors of handlers into google.rpc.Status. Any other exception becomes INTERNAL, without its text."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the handler of one call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        wrap = _wrap_stream if handler.response_streaming else _wrap_unary
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        return make(
            wrap(behaviour, handler_call_details.method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def to_status(error: ServerError) -> status_pb2.Status:
    """The rich status of an error: its code, an ErrorInfo, and what its class adds."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    if isinstance(error, DeadlineUnmeetable):
        info.metadata["estimate_seconds"] = f"{error.estimate:.3f}"
    details: list[message.Message] = [info]
    if isinstance(error, InvalidField):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.description)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, QueueFull):
        delay = duration_pb2.Duration(seconds=math.ceil(error.retry_after))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=code_pb2.Code.Value(error.status), message=str(error), details=packed)


def _wrap_unary(behaviour: Any, method: str) -> Any:
    async def handle(request: Any, context: Any) -> Any:
        try:
            return await behaviour(request, context)
        except Exception as error:  # noqa: BLE001 - the service's edge
            await _abort(context, error, method)

    return handle


def _wrap_stream(behaviour: Any, method: str) -> Any:
    async def handle(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            result = behaviour(request, context)
            if inspect.isawaitable(result):  # a handler that writes to the context itself, such as Health.Watch
                await result
            else:
                async for response in result:
                    yield response
        except Exception as error:  # noqa: BLE001 - the service's edge
            await _abort(context, error, method)

    return handle


async def _abort(context: Any, error: Exception, method: str) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, ServerError):
        _log.error("%s failed", method, exc_info=error)
        error = ServerError("the server failed on this request")
    await context.abort_with_status(rpc_status.to_status(to_status(error)))

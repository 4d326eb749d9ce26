"""Wraps every call: request id, authentication, telemetry, and errors as rich statuses.

Internal details of errors are logged, not sent. Each successful response has `x-request-id` in its initial metadata. Each error
has it in its trailing metadata and its ErrorInfo, and no initial metadata, so that gRPC's own retries work.
"""

import inspect
import logging
import math
import re
import traceback
import uuid
from asyncio import CancelledError
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, nullcontext
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from img2img_server.access.access import Access
from img2img_server.api import wire
from img2img_server.api.grpc_extensions import CALL_IS_GONE
from img2img_server.api.transport import MAX_MESSAGE_BYTES, Readers
from img2img_server.codecs.pool import ImageMemory
from img2img_server.errors import (
    DeadlineUnmeetable,
    Exhausted,
    InvalidField,
    MalformedMessage,
    MessageTooLarge,
    ReaderTooSlow,
    ServerError,
)
from img2img_server.support.call import Call, answering
from img2img_server.telemetry.telemetry import Outcome, Telemetry

_log = logging.getLogger(__name__)

_Parse = Callable[[bytes], tuple[Any, int]]
"""Parses a message. Returns it and the approximate bytes of memory it takes."""
_Read = Callable[[AsyncIterator[bytes]], Awaitable[tuple[Any, int]]]
"""Reads a call's messages. Returns the handler's argument and the approximate bytes of memory it takes."""

DOMAIN = "img2img"
_HEALTH = "/grpc.health.v1.Health/"
"""Health checks are never refused for unread responses: a probe may share its address with a hostile client."""
REQUEST_ID = "x-request-id"
_MAX_TEXT, _MAX_ESCAPED_TEXT = 2000, 300
"""Maximum characters of an error's message, and of one with characters that gRPC escapes as up to 12 bytes each."""
_DEADLINE_SLACK = 0.1
"""A call cancelled within so many seconds of its deadline counts as DEADLINE_EXCEEDED."""
_REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
"""The form of request ids that callers may choose, safe in a log."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Creates a Call for each RPC, which `access` admits and `telemetry` observes, and converts errors to google.rpc.Status.

    Messages arrive as bytes and are parsed after their call is admitted. `memory` accounts for large ones until their call ends;
    `max_bytes` returns the size limit of a method's messages. Exceptions other than ServerError become INTERNAL, without their
    text.
    """

    def __init__(
        self,
        access: Access,
        telemetry: Telemetry,
        memory: ImageMemory,
        max_bytes: Callable[[str], int],
        readers: Readers,
    ) -> None:
        self._access = access
        self._readers = readers
        self._telemetry = telemetry
        self._memory = memory
        self._max_bytes = max_bytes

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the handler of one call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        # Unary methods are registered as request streams: otherwise gRPC would read the message, perhaps a large image, before
        # the call is admitted. They are also response streams, so that the time a client has to read is limited here.
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        read = _each if handler.request_streaming else _only
        parse = _parser(handler.request_deserializer, self._max_bytes(handler_call_details.method))
        return grpc.stream_stream_rpc_method_handler(
            self._wrap(behaviour, lambda requests: read(requests, parse), handler_call_details),
            request_deserializer=None,
            response_serializer=handler.response_serializer,
        )

    def _wrap(self, behaviour: Any, read: _Read, details: grpc.HandlerCallDetails) -> Any:
        async def handle(requests: AsyncIterator[Any], context: Any) -> None:
            async with self._answering(details, context) as call:
                await self._answer(behaviour, read, requests, context, call)

        return handle

    async def _answer(self, behaviour: Any, read: _Read, requests: AsyncIterator[Any], context: Any, call: Call) -> None:
        """Reads and answers a call. A separate frame, because it refers to the message: see `release_frames`."""
        message, size = await read(requests)
        with self._memory.hold(call, size):
            await self._send(behaviour(message, context), context, call)

    async def _send(self, result: Any, context: Any, call: Call) -> None:
        """Sends a handler's responses. A separate frame, which `release_frames` clears after an error."""
        async with aclosing(result if inspect.isasyncgen(result) else _once(result)) as responses:
            begun = False
            async for response in responses:
                if not begun:
                    await context.send_initial_metadata(((REQUEST_ID, call.request_id),))
                    begun = True
                await self._readers.write(context, response, call.client)

    @asynccontextmanager
    async def _answering(self, details: grpc.HandlerCallDetails, context: Any) -> AsyncIterator[Call]:
        metadata: Sequence[tuple[str, str | bytes]] = details.invocation_metadata or ()
        call = call_of(details.method, metadata, context.peer())
        with self._telemetry.call(call) as outcome:
            try:
                with self._access.admitted(call, metadata) as admitted, answering(admitted):
                    outcome.client = admitted.client
                    if not call.method.startswith(_HEALTH):
                        self._readers.check(admitted.client)
                    yield admitted
            except (CancelledError, GeneratorExit):
                outcome.status = cancelled_status(context.time_remaining())
                raise
            except grpc.aio.AbortError:
                outcome.status = context.code().name
                raise
            except CALL_IS_GONE:  # the client has left
                outcome.status = "CANCELLED"
                raise CancelledError from None
            except Exception as caught:  # noqa: BLE001 - outermost handler
                error = failed(caught, call, outcome)
                rich = rpc_status.to_status(to_status(error, call.request_id))
                # abort_with_status would replace all other metadata by the status's own.
                trailing = (*rich.trailing_metadata, (REQUEST_ID, call.request_id))
                unread = self._readers.unread(outcome.client) if isinstance(error, ReaderTooSlow) else nullcontext()
                try:
                    with unread:
                        await context.abort(rich.code, rich.details, trailing)
                except CALL_IS_GONE:
                    raise CancelledError from None


async def _once(response: Awaitable[Any]) -> AsyncGenerator[Any, None]:
    """Yields the response of a unary method."""
    yield await response


def _parser(parse: Callable[[bytes], Any] | None, most: int) -> _Parse:
    """A parser of messages of at most `most` bytes. Small messages count as 0 bytes of memory.

    The parser raises MessageTooLarge, MalformedMessage or InvalidField.
    """
    if parse is None:
        return lambda data: (data, 0)
    descriptor = parse.__self__.DESCRIPTOR  # type: ignore[attr-defined] # generated code passes a message class's FromString

    def parsed(data: bytes) -> tuple[Any, int]:
        if len(data) > most:
            raise MessageTooLarge(f"the message has {len(data)} bytes, the maximum for this method is {most}")
        size = wire.check(data, descriptor)
        try:
            return parse(data), size if size > MAX_MESSAGE_BYTES else 0
        except message.DecodeError:
            raise MalformedMessage("the message cannot be parsed as this method's request type") from None

    return parsed


async def _only(requests: AsyncIterator[bytes], parse: _Parse) -> tuple[Any, int]:
    """Reads the only message of a call. Raises MalformedMessage if it is missing or cannot be parsed.

    Closes gRPC's iterator, which refers to the last message and is part of a reference cycle: otherwise the message would stay in
    memory until garbage collection.
    """
    async with aclosing(aiter(requests)) as messages:  # type: ignore[type-var] # gRPC's is an asynchronous generator
        request = await anext(messages, None)
    if request is None:
        raise MalformedMessage("the call has no message")
    return parse(request)


async def _each(requests: AsyncIterator[bytes], parse: _Parse) -> tuple[AsyncIterator[Any], int]:
    """An iterator over a call's messages, whose memory the handler accounts for. It raises MalformedMessage."""

    async def parsed() -> AsyncIterator[Any]:
        async with aclosing(aiter(requests)) as messages:  # type: ignore[type-var] # see _only
            async for request in messages:
                yield parse(request)[0]

    return parsed(), 0


def call_of(method: str, metadata: Sequence[tuple[str, str | bytes]], peer: str) -> Call:
    """Creates a Call from its metadata. `peer` is gRPC's name of the caller's address, such as "ipv4:127.0.0.1:4711"."""
    sent = {key: value for key, value in metadata if isinstance(value, str)}
    request_id = sent.get(REQUEST_ID, "")
    if not _REQUEST_ID_FORM.fullmatch(request_id):
        request_id = uuid.uuid4().hex
    host = peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer
    return Call(method, request_id, client=host, traceparent=sent.get("traceparent", ""))


def failed(caught: Exception, call: Call, outcome: Outcome) -> ServerError:
    """The error that a call ends with, which becomes its outcome. An internal error is logged, and its text withheld.

    Releases what the frames of `caught` hold.
    """
    error = caught
    if not isinstance(error, ServerError):
        _log.error("%s failed", call.method, exc_info=error, extra={"request_id": call.request_id})
        error = ServerError("internal server error")
    outcome.status, outcome.reason = error.status, error.reason
    release_frames(caught)
    return error


def release_frames(error: BaseException) -> None:
    """Clears the frames in the tracebacks of an error and its contexts, which may refer to large images that would otherwise stay
    in memory until garbage collection. The tracebacks are lost."""
    current: BaseException | None = error
    while current is not None:
        traceback.clear_frames(current.__traceback__)
        current.__traceback__ = None  # frames that still run cannot be cleared, only dropped
        current = current.__context__


def _brief(text: str) -> str:
    """Truncates a message, which may quote the request, to fit into metadata: clients accept 8 KiB in total."""
    plain = text.isascii() and text.isprintable()
    most = _MAX_TEXT if plain else _MAX_ESCAPED_TEXT
    return text if len(text) <= most else f"{text[:most]}..."


def cancelled_status(seconds_left: float | None) -> str:
    """The status of a call that was cancelled with `seconds_left` until its deadline, None for no deadline.

    The caller's clock for the deadline started slightly before the server's, so the caller cancels first.
    """
    return "CANCELLED" if seconds_left is None or seconds_left > _DEADLINE_SLACK else "DEADLINE_EXCEEDED"


def to_status(error: ServerError, request_id: str = "") -> status_pb2.Status:
    """The rich status of an error: its code, an ErrorInfo, and the details of its class."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    if request_id:
        info.metadata["request_id"] = request_id
    if isinstance(error, DeadlineUnmeetable):
        info.metadata["estimate_seconds"] = f"{error.estimate:.3f}"
    details: list[message.Message] = [info]
    if isinstance(error, InvalidField):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=_brief(error.description))
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, Exhausted) and error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(math.ceil(error.retry_after * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=code_pb2.Code.Value(error.status), message=_brief(str(error)), details=packed)

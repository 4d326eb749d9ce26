"""Around every call: its name in the log, who makes it and whether they may, and errors as rich statuses.

What is not meant for callers stays in the log. Each successful answer has `x-request-id` in its initial metadata; each error
has it in its trailing metadata and its ErrorInfo, and no initial metadata at all, so that gRPC's own retries still work on it.
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
from img2img_server.api.grpc_batches import CALL_IS_GONE
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
from img2img_server.telemetry.telemetry import Telemetry

_log = logging.getLogger(__name__)

_Parse = Callable[[bytes], tuple[Any, int]]
"""Gives a message, and the bytes of memory that it takes, about."""
_Reader = Callable[[AsyncIterator[bytes], _Parse], Awaitable[Any]]
"""Of a call's messages, in bytes, and of what parses one: gives what its handler takes, and its memory."""
_Read = Callable[[AsyncIterator[bytes]], Awaitable[tuple[Any, int]]]

DOMAIN = "img2img"
_HEALTH = "/grpc.health.v1.Health/"
"""Never refused for what its client does not read: a probe may come from the address of a hostile client."""
REQUEST_ID = "x-request-id"
_MAX_TEXT, _MAX_ESCAPED_TEXT = 2000, 300
"""Characters of an error's message, and of one in which gRPC writes some as up to 12."""
_DEADLINE_SLACK = 0.1
"""Seconds before its deadline in which a call that is given up counts as late."""
_REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
"""Of an id that a caller chose: what is harmless in a log."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Makes a Call of each RPC, has `access` admit it and `telemetry` observe it, and turns errors into google.rpc.Status.

    Messages come as bytes, and are parsed once their call is admitted. `memory` accounts for those that are large until their
    call ends; `max_bytes` gives the largest message of a method. Any other exception than a ServerError becomes INTERNAL, without
    its text.
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
        # A stream of requests, also where there is one: gRPC would else read it before the call is admitted and counted, and
        # whoever is refused must not have the server hold an image for it. A stream of responses, too: so the time that a client
        # has to read them is bounded here.
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
        """Answers a call. In a frame of its own, as `_send` is: it has the message."""
        asked, size = await read(requests)
        with self._memory.hold(call, size):
            await self._send(behaviour(asked, context), context, call)

    async def _send(self, result: Any, context: Any, call: Call) -> None:
        """Sends what a handler gives. In a frame of its own, which an error's end frees: see `let_go`."""
        async with aclosing(result if inspect.isasyncgen(result) else _once(result)) as responses:
            told = False
            async for response in responses:
                if not told:
                    await context.send_initial_metadata(((REQUEST_ID, call.request_id),))
                    told = True
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
                outcome.status = given_up(context.time_remaining())
                raise
            except grpc.aio.AbortError:
                outcome.status = context.code().name
                raise
            except CALL_IS_GONE:  # the client has left
                outcome.status = "CANCELLED"
                raise CancelledError from None
            except Exception as caught:  # noqa: BLE001 - the service's edge
                error = caught
                if not isinstance(error, ServerError):
                    _log.error("%s failed", call.method, exc_info=error, extra={"request_id": call.request_id})
                    error = ServerError("internal server error")
                outcome.status, outcome.reason = error.status, error.reason
                let_go(caught)
                rich = rpc_status.to_status(to_status(error, call.request_id))
                # With abort_with_status, the status' own metadata would take the place of any other.
                trailing = (*rich.trailing_metadata, (REQUEST_ID, call.request_id))
                unread = self._readers.unread(outcome.client) if isinstance(error, ReaderTooSlow) else nullcontext()
                try:
                    with unread:
                        await context.abort(rich.code, rich.details, trailing)
                except CALL_IS_GONE:
                    raise CancelledError from None


async def _once(response: Awaitable[Any]) -> AsyncGenerator[Any, None]:
    """The one response of a method that does not stream."""
    yield await response


def _parser(parse: Callable[[bytes], Any] | None, most: int) -> _Parse:
    """What parses a message of at most so many bytes. A small message counts for no memory.

    It raises MessageTooLarge, MalformedMessage or InvalidField.
    """
    if parse is None:
        return lambda data: (data, 0)
    descriptor = parse.__self__.DESCRIPTOR  # type: ignore[attr-defined] # gRPC's stubs have a message class' FromString

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
    """The only message of a call. Raises MalformedMessage if it is missing or cannot be parsed.

    gRPC's iterator is closed: it holds the last message and is part of a cycle, so the message would live until Python collects
    cycles.
    """
    async with aclosing(aiter(requests)) as messages:  # type: ignore[type-var] # gRPC's is an asynchronous generator
        request = await anext(messages, None)
    if request is None:
        raise MalformedMessage("the call has no message")
    return parse(request)


async def _each(requests: AsyncIterator[bytes], parse: _Parse) -> tuple[AsyncIterator[Any], int]:
    """A call's messages as they come; their handler accounts for them. Each raises MalformedMessage where it cannot be parsed."""

    async def parsed() -> AsyncIterator[Any]:
        async with aclosing(aiter(requests)) as messages:  # type: ignore[type-var] # see _only
            async for request in messages:
                yield parse(request)[0]

    return parsed(), 0


def call_of(method: str, metadata: Sequence[tuple[str, str | bytes]], peer: str) -> Call:
    """The call described by the metadata. `peer` is gRPC's name of the caller's address, such as "ipv4:127.0.0.1:4711"."""
    sent = {key: value for key, value in metadata if isinstance(value, str)}
    request_id = sent.get(REQUEST_ID, "")
    if not _REQUEST_ID_FORM.fullmatch(request_id):
        request_id = uuid.uuid4().hex
    host = peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer
    return Call(method, request_id, client=host, traceparent=sent.get("traceparent", ""))


def let_go(error: BaseException) -> None:
    """Frees what the frames hold that an error, and those behind it, came through: an image of 100 MB perhaps, that would else
    live until Python looks for cycles. Nobody can tell afterwards where it was raised."""
    behind: BaseException | None = error
    while behind is not None:
        traceback.clear_frames(behind.__traceback__)
        behind.__traceback__ = None  # it also has frames that have not ended yet, and are none the emptier
        behind = behind.__context__


def _brief(text: str) -> str:
    """A message that fits into metadata, where callers take 8 KiB in all: it may quote what they sent."""
    plain = text.isascii() and text.isprintable()
    most = _MAX_TEXT if plain else _MAX_ESCAPED_TEXT
    return text if len(text) <= most else f"{text[:most]}..."


def given_up(seconds_left: float | None) -> str:
    """The status of a call that its caller gave up with so many seconds left until its deadline, None for no deadline.

    The caller's own clock for the deadline began a little before the server's, so that one cancels first.
    """
    return "CANCELLED" if seconds_left is None or seconds_left > _DEADLINE_SLACK else "DEADLINE_EXCEEDED"


def to_status(error: ServerError, request_id: str = "") -> status_pb2.Status:
    """The rich status of an error: its code, an ErrorInfo, and what its class adds."""
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

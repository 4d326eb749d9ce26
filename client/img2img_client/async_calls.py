"""Calls of an AsyncClient, with retries and cancellation: `calls.py` for asyncio."""

# ruff: noqa: ASYNC109 - a timeout here is a deadline that is sent to the server

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import grpc
from google.protobuf.message import Message
from grpc import aio

from img2img_client.calls import CallSettings, Metadata, StartedCall, require_open
from img2img_client.errors import Img2ImgError
from img2img_client.responses import parse_error, parse_request_id
from img2img_client.retry import Attempts, closed_error

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)
_Result = TypeVar("_Result")


class AsyncStop:
    """Ends the waits of a closed stream or client early; `retry.Stop` for asyncio."""

    def __init__(self, parent: "AsyncStop | None" = None) -> None:
        self._parent = parent
        self._event = asyncio.Event()

    @property
    def is_set(self) -> bool:
        """Whether the stream or client is closed."""
        return self._event.is_set() or (self._parent is not None and self._parent.is_set)

    def set(self) -> None:
        """Ends all current and future waits."""
        self._event.set()

    async def wait(self, seconds: float) -> bool:
        """Waits `seconds`; returns True if the wait was ended early."""
        events = [self._event] if self._parent is None else [self._event, self._parent._event]
        waits = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return self.is_set


class AsyncCaller:
    """Makes the calls of one AsyncClient. `stop` ends their waits."""

    def __init__(self, settings: CallSettings) -> None:
        self.settings = settings
        self.stop = AsyncStop()

    def begin(self, procedure: str, timeout: float | None, *, safe: bool = True, request_id: str | None = None) -> StartedCall:
        """Starts a call, like `Caller.begin`."""
        require_open(self.stop.is_set)
        return self.settings.begin(procedure, timeout, safe=safe, request_id=request_id)

    async def unary(
        self,
        procedure: str,
        method: "aio.UnaryUnaryMultiCallable[_Request, _Response]",
        request: _Request,
        timeout: float | None,
        *,
        safe: bool = True,
        request_id: str | None = None,
    ) -> tuple[_Response, str]:
        """Calls a unary procedure. Returns the response and the request id."""

        async def attempt(seconds: float | None, metadata: Metadata) -> tuple[_Response, str]:
            return await finish_async(method(request, timeout=seconds, metadata=metadata), self.stop)

        return await self.run(procedure, attempt, timeout, safe=safe, request_id=request_id)

    async def run(
        self,
        procedure: str,
        attempt: Callable[[float | None, Metadata], Awaitable[tuple[_Result, str]]],
        timeout: float | None,
        *,
        safe: bool = True,
        request_id: str | None = None,
    ) -> tuple[_Result, str]:
        """Calls a procedure with `attempt`, like `Caller.run`."""
        begun = self.begin(procedure, timeout, safe=safe, request_id=request_id)
        with begun.span:
            while True:
                try:
                    result, answered = await attempt(begun.attempts.seconds_left(), begun.metadata)
                except Img2ImgError as error:
                    if not await wait_again_async(begun.attempts, error, self.stop):
                        raise
                else:
                    begun.span.answered(answered)
                    return result, answered


async def finish_async(
    call: "aio.UnaryUnaryCall[_Request, _Response] | aio.StreamUnaryCall[_Request, _Response]", stop: AsyncStop
) -> tuple[_Response, str]:
    """Waits for a call's response. Returns it and the request id. Raises an Img2ImgError.

    Cancelling the task cancels the call.
    """
    with converted_errors(stop):
        return await call, parse_request_id(await call.initial_metadata())


@contextmanager
def converted_errors(stop: AsyncStop) -> Iterator[None]:
    """Converts gRPC errors within the block to Img2ImgError, including the CancelledError of a call that `stop` has ended."""
    try:
        yield
    except grpc.RpcError as error:
        raise parse_error(error) from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if stop.is_set and (task is None or not task.cancelling()):
            raise closed_error() from None
        raise


async def wait_again_async(attempts: Attempts, error: Img2ImgError, stop: AsyncStop, *, begun: bool = False) -> bool:
    """Waits for the next attempt, like `retry.wait_again`; returns False if there is none."""
    wait = attempts.failed(error, begun=begun)
    if wait is None:
        return False
    if await stop.wait(wait):
        raise closed_error(error.request_id) from error
    return attempts.is_in_time()

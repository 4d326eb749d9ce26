"""What `calls.py` is for asyncio: how an AsyncClient makes a call, waits, and tells who cancelled what."""

# ruff: noqa: ASYNC109 - a time-out is a deadline here, which the server is told

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import grpc
from google.protobuf.message import Message
from grpc import aio

from img2img_client.calls import Begun, Calling, Metadata, require_open
from img2img_client.errors import Img2ImgError
from img2img_client.responses import parse_error, parse_request_id
from img2img_client.retry import Attempts, closed_meanwhile

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)
_Result = TypeVar("_Result")


class AsyncStop:
    """Ends waits early, as `retry.Stop` does for threads: those of a stream that is closed, or of a client that is."""

    def __init__(self, parent: "AsyncStop | None" = None) -> None:
        self._parent = parent
        self._event = asyncio.Event()

    @property
    def is_set(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return self._event.is_set() or (self._parent is not None and self._parent.is_set)

    def set(self) -> None:
        """Ends every wait, now and later."""
        self._event.set()

    async def wait(self, seconds: float) -> bool:
        """Waits so long, and returns whether it was ended early."""
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

    def __init__(self, calling: Calling) -> None:
        self.calling = calling
        self.stop = AsyncStop()

    def begin(self, procedure: str, timeout: float | None, *, safe: bool = True, request_id: str | None = None) -> Begun:
        """Begins a call, as `Caller.begin` does."""
        require_open(self.stop)
        return self.calling.begin(procedure, timeout, safe=safe, request_id=request_id)

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
        """Calls a procedure of one message each way. Returns the answer and the call's name in the server's log."""

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
        """Calls a procedure by `attempt`, as `Caller.run` does."""
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
    """Waits for a call's answer; gives it and the call's name in the server's log. Raises an Img2ImgError.

    A task that is cancelled meanwhile cancels the call.
    """
    with answering(stop):
        return await call, parse_request_id(await call.initial_metadata())


@contextmanager
def answering(stop: AsyncStop) -> Iterator[None]:
    """What gRPC raises within, as an Img2ImgError: also of a call that `stop` has ended, which looks to a task as if it were
    itself cancelled."""
    try:
        yield
    except grpc.RpcError as error:
        raise parse_error(error) from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if stop.is_set and (task is None or not task.cancelling()):
            raise closed_meanwhile() from None
        raise


async def wait_again_async(attempts: Attempts, error: Img2ImgError, stop: AsyncStop, *, begun: bool = False) -> bool:
    """Waits and returns True where another attempt is due, as `retry.wait_again` does."""
    wait = attempts.failed(error, begun=begun)
    if wait is None:
        return False
    if await stop.wait(wait):
        raise closed_meanwhile(error.request_id) from error
    return attempts.is_in_time()

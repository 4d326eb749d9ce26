"""The events of one request as an async iterator: `stream.py` for asyncio."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeAlias

from img2img.v1 import image_to_image_pb2

from img2img_client.async_calls import AsyncStop, converted_errors, wait_again_async
from img2img_client.calls import StartedCall
from img2img_client.errors import Img2ImgError
from img2img_client.responses import parse_event, parse_request_id
from img2img_client.retry import closed_error
from img2img_client.stream_state import StreamState, ended_without_result
from img2img_client.values import Completed, TransformEvent

if TYPE_CHECKING:
    from grpc import aio

    _Call: TypeAlias = aio.UnaryStreamCall[image_to_image_pb2.TransformStreamRequest, image_to_image_pb2.TransformStreamResponse]


class AsyncTransformStream(AsyncIterator[TransformEvent]):
    """The events of one request: Queued (repeated if its position changes), Started, Progress per step, then Completed.

    The call starts when the first event is requested, and is retried like a TransformStream. Leaving the context, `close()`,
    garbage collection, and cancelling a task that waits for an event cancel the call. A failed call raises an Img2ImgError.
    """

    def __init__(
        self,
        prepare: Callable[[], StreamState],
        call: "Callable[[image_to_image_pb2.TransformStreamRequest, float | None], _Call]",
        begun: StartedCall,
        stop: AsyncStop,
    ) -> None:
        """`prepare` reads the image on another thread; `call` starts an attempt with a timeout in seconds."""
        self._prepare = prepare
        self._make = call
        self._attempts = begun.attempts
        self._span = begun.span
        self._stop = stop
        self._state: StreamState | None = None
        self._call: _Call | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = False
        self.request_id = ""

    async def __anext__(self) -> TransformEvent:
        if self._ended:
            raise StopAsyncIteration
        try:
            if self._state is None:
                self._state = await asyncio.to_thread(self._prepare)
            while True:
                try:
                    return await self._next(self._state)
                except Img2ImgError as failure:
                    self._call = None
                    begun = self._state.lost()
                    if self._stop.is_set or not await wait_again_async(self._attempts, failure, self._stop, begun=begun):
                        raise
        except asyncio.CancelledError:
            await self.close()
            self._ended = True
            raise
        except (Img2ImgError, OSError, TypeError, ValueError) as error:
            self._ended = True
            self._span.end(error)
            raise

    async def close(self) -> None:
        """Cancels the call if it has not ended."""
        self._stop.set()
        if self._call is not None:
            self._call.cancel()
        self._span.end(status="CANCELLED")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    def __del__(self) -> None:
        # May run on any thread, so the call is cancelled on its event loop.
        self._span.end(status="CANCELLED")
        if self._call is not None and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._call.cancel)

    async def _next(self, state: StreamState) -> TransformEvent:
        if self._stop.is_set:
            raise closed_error(self.request_id)
        if self._call is None:
            self.request_id = ""
            self._loop = asyncio.get_running_loop()
            self._call = self._make(state.request, self._attempts.seconds_left())
        call = self._call
        with converted_errors(self._stop):
            async for message in call:
                state.begun = True
                if not self.request_id:
                    self.request_id = parse_request_id(await call.initial_metadata())
                    self._span.answered(self.request_id)
                event = parse_event(message, self.request_id)
                update = None if event is None else state.accept(event)
                if update is None:
                    continue
                if isinstance(update, Completed):
                    await self._finish(call)
                return update
        raise ended_without_result(self.request_id)

    async def _finish(self, call: "_Call") -> None:
        """Reads the final status, so that the server does not record a cancelled call. The result is valid in any case."""
        self._ended = True
        with suppress(Img2ImgError), converted_errors(self._stop):
            async for _ in call:
                pass
        self._span.end()

"""What `stream.py` is for asyncio: the events of one request, as an asynchronous iterator."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeAlias

from img2img.v1 import image_to_image_pb2

from img2img_client.async_calls import AsyncStop, answering, wait_again_async
from img2img_client.calls import Begun
from img2img_client.errors import Img2ImgError
from img2img_client.responses import parse_event, parse_request_id
from img2img_client.retry import closed_meanwhile
from img2img_client.story import Story, ended_without_result
from img2img_client.values import Completed, TransformEvent

if TYPE_CHECKING:
    from grpc import aio

    _Call: TypeAlias = aio.UnaryStreamCall[image_to_image_pb2.TransformStreamRequest, image_to_image_pb2.TransformStreamResponse]


class AsyncTransformStream(AsyncIterator[TransformEvent]):
    """The events of one request: Queued, again when its place changes, Started, Progress for each step, Completed at last.

    The call begins when the first event is asked for, and is tried again as a TransformStream's is. Leaving the context,
    `close()`, dropping the stream, and cancelling the task that waits for an event cancel the call. A failed call raises an
    Img2ImgError.
    """

    def __init__(
        self,
        prepare: Callable[[], Story],
        call: "Callable[[image_to_image_pb2.TransformStreamRequest, float | None], _Call]",
        begun: Begun,
        stop: AsyncStop,
    ) -> None:
        """`prepare` reads the image, on another thread; `call` makes an attempt, with a time-out."""
        self._prepare = prepare
        self._make = call
        self._attempts = begun.attempts
        self._span = begun.span
        self._stop = stop
        self._story: Story | None = None
        self._call: _Call | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = False
        self.request_id = ""

    async def __anext__(self) -> TransformEvent:
        if self._ended:
            raise StopAsyncIteration
        try:
            if self._story is None:
                self._story = await asyncio.to_thread(self._prepare)
            while True:
                try:
                    return await self._next(self._story)
                except Img2ImgError as failure:
                    self._call = None
                    begun = self._story.lost()
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
        """Cancels the call, unless it has ended."""
        self._stop.set()
        if self._call is not None:
            self._call.cancel()
        self._span.end(status="CANCELLED")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    def __del__(self) -> None:
        # Nobody else ends what is dropped; and by whichever thread that is, a call is its event loop's.
        self._span.end(status="CANCELLED")
        if self._call is not None and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._call.cancel)

    async def _next(self, story: Story) -> TransformEvent:
        if self._stop.is_set:
            raise closed_meanwhile(self.request_id)
        if self._call is None:
            self.request_id = ""
            self._loop = asyncio.get_running_loop()
            self._call = self._make(story.request, self._attempts.seconds_left())
        call = self._call
        with answering(self._stop):
            async for message in call:
                story.begun = True
                if not self.request_id:
                    self.request_id = parse_request_id(await call.initial_metadata())
                    self._span.answered(self.request_id)
                event = parse_event(message, self.request_id)
                news = None if event is None else story.tell(event)
                if news is None:
                    continue
                if isinstance(news, Completed):
                    await self._finish(call)
                return news
        raise ended_without_result(self.request_id)

    async def _finish(self, call: "_Call") -> None:
        """Reads the status that follows the last event, so that the server does not see a call that was left. The result is
        here, whatever it says."""
        self._ended = True
        with suppress(Img2ImgError), answering(self._stop):
            async for _ in call:
                pass
        self._span.end()

"""The events of one request, as an iterator that can be left at any time."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Protocol, Self

import grpc
from img2img.v1 import image_to_image_pb2

from img2img_client.calls import Begun
from img2img_client.errors import Img2ImgError
from img2img_client.responses import parse_error, parse_event, parse_request_id
from img2img_client.retry import Stop, wait_again
from img2img_client.story import Story, ended_without_result
from img2img_client.values import Completed, TransformEvent


class StreamCall(Protocol):
    """A call whose answer is a stream, as gRPC gives it."""

    def __iter__(self) -> Iterator[image_to_image_pb2.TransformStreamResponse]:
        """The messages of the answer."""

    def cancel(self) -> bool:
        """Ends it."""

    def initial_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """What came before the first message."""


class TransformStream(Iterator[TransformEvent]):
    """The events of one request: Queued, again when its place changes, Started, Progress for each step, Completed at last.

    A call that fails is tried again, as the client's RetryPolicy has it: before Started, Queued may say again what it said; after
    it, the transform is run again from the seed that Started told, and what was told already is not told again.
    Leaving the context, `close()` or dropping the stream cancels what has not ended. A failed call raises an Img2ImgError.
    """

    def __init__(
        self,
        call: Callable[[image_to_image_pb2.TransformStreamRequest, float | None], StreamCall],
        story: Story,
        begun: Begun,
        stop: Stop,
    ) -> None:
        """`call` makes an attempt, with a time-out; `stop` ends the waits between them."""
        self._make = call
        self._story = story
        self._attempts = begun.attempts
        self._stop = stop
        self._span = begun.span
        self._ended = False
        self.request_id = ""
        self._call = self._begin()

    def __next__(self) -> TransformEvent:
        if self._ended:
            raise StopIteration
        try:
            while True:
                try:
                    return self._next()
                except grpc.RpcError as error:
                    failure = parse_error(error)
                    begun = self._story.lost()
                    if self._stop.is_set or not wait_again(self._attempts, failure, self._stop, begun=begun):
                        raise failure from error
                self._call = self._begin()
                if self._stop.is_set:  # Closed meanwhile, by another thread that saw the call before this one.
                    self._call.cancel()
        except Img2ImgError as error:
            self._ended = True
            self._span.end(error)
            raise

    def close(self) -> None:
        """Cancels the call, unless it has ended."""
        self._stop.set()
        self._call.cancel()
        self._span.end(status="CANCELLED")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        # gRPC cancels a call that is dropped, nobody ends a span that is.
        if hasattr(self, "_span"):
            self._span.end(status="CANCELLED")

    def _begin(self) -> StreamCall:
        self.request_id = ""
        return self._make(self._story.request, self._attempts.seconds_left())

    def _finish(self) -> None:
        """Reads the status that follows the last event, so that the server does not see a call that was left. The result is
        here, whatever it says."""
        self._ended = True
        with suppress(grpc.RpcError):
            for _ in self._call:
                pass
        self._span.end()

    def _next(self) -> TransformEvent:
        for message in self._call:
            self._story.begun = True
            if not self.request_id:
                self.request_id = parse_request_id(self._call.initial_metadata())
                self._span.answered(self.request_id)
            event = parse_event(message, self.request_id)
            news = None if event is None else self._story.tell(event)
            if news is None:
                continue
            if isinstance(news, Completed):
                self._finish()
            return news
        raise ended_without_result(self.request_id)

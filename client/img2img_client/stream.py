"""The events of one request, as an iterator that can be closed at any time."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Protocol, Self

import grpc
from img2img.v1 import image_to_image_pb2

from img2img_client.calls import StartedCall
from img2img_client.errors import Img2ImgError
from img2img_client.responses import parse_error, parse_event, parse_request_id
from img2img_client.retry import Stop, wait_again
from img2img_client.stream_state import StreamState, ended_without_result
from img2img_client.values import Completed, TransformEvent


class StreamCall(Protocol):
    """A gRPC call with a stream of responses."""

    def __iter__(self) -> Iterator[image_to_image_pb2.TransformStreamResponse]:
        """The response messages."""

    def cancel(self) -> bool:
        """Cancels the call."""

    def initial_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The metadata that precedes the first message."""


class TransformStream(Iterator[TransformEvent]):
    """The events of one request: Queued (repeated if its position changes), Started, Progress per step, then Completed.

    A failed call is retried by the client's RetryPolicy. Before Started, Queued may be repeated; after Started, the transform
    runs again with the seed from Started, and no event is delivered twice. Leaving the context, `close()` and garbage collection
    cancel a running call. A failed call raises an Img2ImgError.
    """

    def __init__(
        self,
        call: Callable[[image_to_image_pb2.TransformStreamRequest, float | None], StreamCall],
        state: StreamState,
        begun: StartedCall,
        stop: Stop,
    ) -> None:
        """`call` starts an attempt with a timeout in seconds; `stop` ends the waits between attempts."""
        self._make = call
        self._state = state
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
                    begun = self._state.lost()
                    if self._stop.is_set or not wait_again(self._attempts, failure, self._stop, begun=begun):
                        raise failure from error
                self._call = self._begin()
                if self._stop.is_set:  # Another thread closed the stream, and cancelled the previous call.
                    self._call.cancel()
        except Img2ImgError as error:
            self._ended = True
            self._span.end(error)
            raise

    def close(self) -> None:
        """Cancels the call if it has not ended."""
        self._stop.set()
        self._call.cancel()
        self._span.end(status="CANCELLED")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        # gRPC cancels a garbage-collected call, but the span must be ended here.
        if hasattr(self, "_span"):
            self._span.end(status="CANCELLED")

    def _begin(self) -> StreamCall:
        self.request_id = ""
        return self._make(self._state.request, self._attempts.seconds_left())

    def _finish(self) -> None:
        """Reads the final status, so that the server does not record a cancelled call. The result is valid in any case."""
        self._ended = True
        with suppress(grpc.RpcError):
            for _ in self._call:
                pass
        self._span.end()

    def _next(self) -> TransformEvent:
        for message in self._call:
            self._state.begun = True
            if not self.request_id:
                self.request_id = parse_request_id(self._call.initial_metadata())
                self._span.answered(self.request_id)
            event = parse_event(message, self.request_id)
            update = None if event is None else self._state.accept(event)
            if update is None:
                continue
            if isinstance(update, Completed):
                self._finish()
            return update
        raise ended_without_result(self.request_id)

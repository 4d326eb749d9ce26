"""Many images through one call: `Client.transform_batch`."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import grpc
from google.rpc import status_pb2  # type: ignore[import-untyped, unused-ignore]
from img2img.v1 import image_to_image_pb2 as messages

from img2img_client.calls import StartedCall
from img2img_client.errors import Img2ImgError, ServerFailed, Unavailable
from img2img_client.options import TransformOptions, build_request
from img2img_client.responses import parse_error, parse_result, parse_status
from img2img_client.retry import Stop, wait_again
from img2img_client.values import BatchResult, ImageInput

if TYPE_CHECKING:
    from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub

BatchItem = tuple[ImageInput, TransformOptions]
"""One request of a batch: an image and its options."""


class Batch:
    """The requests of a batch, sent and answered. gRPC's thread takes requests from `feed`; the caller's thread reads results.

    `items` is read as the server takes requests, one at a time. If a call breaks, requests without a result are sent again by the
    next one.
    """

    def __init__(self, items: Iterable[BatchItem]) -> None:
        self._items = iter(items)
        self._lock = threading.Lock()
        self._open: dict[int, messages.TransformBatchRequest] = {}
        self._failed: deque[BatchResult] = deque()
        self._count = 0
        self._call = 0
        self._ended = False
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether every request has its result."""
        return self._ended and not self._open

    def begin(self) -> Iterator[tuple[int, messages.TransformBatchRequest]]:
        """The requests of a new call, each with its index in the batch."""
        with self._lock:
            self._call += 1
            return self._feed(self._call, set())

    def _feed(self, call: int, sent: set[int]) -> Iterator[tuple[int, messages.TransformBatchRequest]]:
        while (item := self._next(call, sent)) is not None:
            yield item

    def _next(self, call: int, sent: set[int]) -> tuple[int, messages.TransformBatchRequest] | None:
        """The next request that `call` has not sent. None if there is none, or a later call has begun."""
        with self._lock:
            while call == self._call:
                again = next((index for index in self._open if index not in sent), None)
                if again is None:
                    if self._ended:
                        return None
                    self._read()
                    continue
                sent.add(again)
                return again, self._open[again]
            return None

    def _read(self) -> None:
        """Takes one item. An image that cannot be read, or a wrong option, is the item's own failure."""
        try:
            image, options = next(self._items)
        except StopIteration:
            self._ended = True
            return
        except BaseException as error:  # noqa: BLE001 - raised on the caller's thread
            self._ended, self._error = True, error
            return
        index, self._count = self._count, self._count + 1
        try:
            self._open[index] = messages.TransformBatchRequest(request=build_request(image, options))
        except (OSError, TypeError, ValueError) as error:
            self._failed.append(BatchResult(index, error=error))

    def outcome(self, index: int, response: messages.TransformBatchResponse) -> BatchResult | None:
        """The outcome of request `index`, None if it has one already. Raises Unavailable if the server stops."""
        if response.HasField("response"):
            outcome = BatchResult(index, parse_result(response.response))
        else:
            outcome = BatchResult(index, error=parse_status(status_pb2.Status.FromString(response.status)))
        if isinstance(outcome.error, Unavailable):
            raise outcome.error
        with self._lock:
            return None if self._open.pop(index, None) is None else outcome

    def check_done(self) -> None:
        """Raises ServerFailed if a call ended well without a result for each request."""
        if not self.done:
            raise ServerFailed("the server ended the batch without a result for each request", status="INTERNAL")

    def failures(self) -> Iterator[BatchResult]:
        """The items that failed here since the last call."""
        while self._failed:
            yield self._failed.popleft()

    def finish(self) -> None:
        """Raises what reading the items raised."""
        if self._error is not None:
            raise self._error


def run(stub: "ImageToImageServiceStub", items: Iterable[BatchItem], begun: StartedCall, stop: Stop) -> Iterator[BatchResult]:
    """Yields the results of a batch as they come."""
    batch = Batch(items)
    with begun.span:
        while not batch.done:
            try:
                yield from _call(stub, batch, begun)
            except Img2ImgError as error:
                yield from batch.failures()
                if not batch.done and not wait_again(begun.attempts, error, stop):
                    raise
    yield from batch.failures()
    batch.finish()


def _call(stub: "ImageToImageServiceStub", batch: Batch, begun: StartedCall) -> Iterator[BatchResult]:
    """One call. Raises the error that it ended with, or that one of its requests did because the server stops."""
    order: list[int] = []
    """The index in the batch of each request of this call."""

    def requests() -> Iterator[messages.TransformBatchRequest]:
        for index, message in batch.begin():
            order.append(index)
            yield message

    call = stub.TransformBatch(requests(), timeout=begun.attempts.seconds_left(), metadata=begun.metadata)
    try:
        for response in call:
            yield from batch.failures()
            if (outcome := batch.outcome(order[response.index], response)) is not None:
                yield outcome
    except grpc.RpcError as error:
        raise parse_error(error) from error
    finally:
        call.cancel()
    batch.check_done()

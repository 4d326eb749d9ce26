"""Many images through one call, for asyncio: `AsyncClient.transform_batch`."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from typing import TYPE_CHECKING

from img2img.v1 import image_to_image_pb2 as messages

from img2img_client.async_calls import AsyncStop, converted_errors, wait_again_async
from img2img_client.batch import Batch, BatchItem
from img2img_client.calls import StartedCall
from img2img_client.errors import Img2ImgError
from img2img_client.values import BatchResult

if TYPE_CHECKING:
    from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceAsyncStub


async def run_async(
    stub: "ImageToImageServiceAsyncStub", items: Iterable[BatchItem], begun: StartedCall, stop: AsyncStop
) -> AsyncGenerator[BatchResult, None]:
    """Yields the results of a batch as they come, like `batch.run`. Reads `items` on other threads."""
    batch = Batch(items)
    with begun.span:
        while not batch.done:
            try:
                async with aclosing(_call(stub, batch, begun, stop)) as outcomes:
                    async for outcome in outcomes:
                        yield outcome
            except Img2ImgError as error:
                for outcome in batch.failures():
                    yield outcome
                if not batch.done and not await wait_again_async(begun.attempts, error, stop):
                    raise
    for outcome in batch.failures():
        yield outcome
    batch.finish()


async def _call(
    stub: "ImageToImageServiceAsyncStub", batch: Batch, begun: StartedCall, stop: AsyncStop
) -> AsyncGenerator[BatchResult, None]:
    """One call, like `batch._call`."""
    order: list[int] = []

    async def requests() -> AsyncIterator[messages.TransformBatchRequest]:
        feed = await asyncio.to_thread(batch.begin)
        while (item := await asyncio.to_thread(next, feed, None)) is not None:
            order.append(item[0])
            yield item[1]

    call = stub.TransformBatch(requests(), timeout=begun.attempts.seconds_left(), metadata=begun.metadata)
    try:
        with converted_errors(stop):
            async for response in call:
                for failure in batch.failures():
                    yield failure
                if (outcome := batch.outcome(order[response.index], response)) is not None:
                    yield outcome
    finally:
        call.cancel()
    batch.check_done()

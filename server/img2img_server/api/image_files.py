"""Reads the files of a request's images: one after the other, so that only one is in memory."""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

from img2img.v1 import image_to_image_pb2 as pb

from img2img_server.codecs.pool import ImageMemory
from img2img_server.errors import InvalidField
from img2img_server.images import ImageLimits
from img2img_server.sources.reading import Sources, is_fetched
from img2img_server.support.call import current
from img2img_server.support.cancellation import time_limit

SHARE = 2
"""The images of a field with several have together as many times the bytes and pixels that one image may have."""


@contextmanager
def held(memory: ImageMemory, source: pb.ImageSource, data: bytes) -> Iterator[None]:
    """Accounts for the bytes of a source's file within the block. The bytes of the message itself are accounted for already.
    Raises ImageMemoryFull."""
    with memory.hold(current(), 0 if source.WhichOneof("source") == "data" else len(data)):
        yield


class ImageFiles:
    """The image files in one `field` of a request, with limits for all of them together: SHARE times the bytes and pixels of one
    image, and `seconds` of `clock` for fetching. The caller subtracts the pixels of each decoded image from `pixels_left`."""

    def __init__(
        self,
        field: str,
        sources: Sources,
        memory: ImageMemory,
        limits: ImageLimits,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pixels_left = SHARE * limits.max_source_pixels
        self._field, self._sources, self._memory, self._clock = field, sources, memory, clock
        self._bytes = self._bytes_left = SHARE * limits.max_bytes
        self._seconds = self._seconds_left = seconds

    @asynccontextmanager
    async def open(self, source: pb.ImageSource, name: str) -> AsyncIterator[tuple[str, bytes]]:
        """The full name of the image's field, such as "reference_images[0].uri", and the file's bytes, which are accounted for
        within the block.

        Raises InvalidField, naming the image or the field for bounds of all, or an error of reading sources.
        """
        began, fetched = self._clock(), is_fetched(source)
        async with time_limit(self._seconds_left if fetched else None, partial(self._too_slow, name)):
            field, data = await self._sources.read(source, name)
        if fetched:
            self._seconds_left = max(0.0, self._seconds_left - (self._clock() - began))
        self._bytes_left -= len(data)
        if self._bytes_left < 0:
            raise InvalidField(
                self._field, f"the files have together more than {self._bytes} bytes, the maximum: send fewer or smaller ones"
            )
        with held(self._memory, source, data):
            yield field, data

    def _too_slow(self, name: str) -> InvalidField:
        return InvalidField(f"{name}.uri", f"fetching the images took longer than {self._seconds:g} seconds together")

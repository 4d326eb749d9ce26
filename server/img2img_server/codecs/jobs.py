"""Jobs of a codec process (functions of bytes, without the event loop, gRPC or torch) and its messages to the server.

Messages are small and pickled. Bytes of images are in files without a name.
"""

import hashlib
import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

from PIL import Image

from img2img_server import images
from img2img_server.codecs import structure
from img2img_server.errors import InvalidField, StorageFailed
from img2img_server.images import ImageLimits, SizeRule, WriteFormat

Reserve = Callable[[int, float], None]
"""Asks for so many bytes and seconds of processor time beyond those of a small image. Raises ImageMemoryFull."""

_BYTES_PER_PIXEL, _OF_JPEG = 28, 16
"""Of decoding, at most: the decoder's own, its output, conversions to RGB and the upright image, mostly of four bytes each.
Measured were 26, for WebP and for TIFFs of floats; a JPEG needs less, and most large sources are one."""
_COPIES = 3
"""Of the file, at most: what came, what Pillow reads, and a decoder's buffer."""
_WEBP_CANVAS = 8
"""Bytes a pixel that a WebP takes when it is opened: two canvases."""
_SECONDS_PER_PIXEL = 0.25e-6
_SECONDS_PER_BYTE = 0.25e-6
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Loaded:
    """A source at the result's size, as raw RGB, and the digest of its pixels."""

    size: tuple[int, int]
    digest: bytes


@dataclass(frozen=True, slots=True)
class LoadImage:
    """Decodes an image file and resizes it to a result's size, rounded down to `multiple` pixels. `field` is what errors
    name. The result must fit into a file of `file_format`."""

    field: str
    limits: ImageLimits
    size_rule: SizeRule
    multiple: int
    file_format: WriteFormat

    def run(self, data: bytes, reserve: Reserve) -> tuple[Loaded, bytes]:
        """The image and its pixels. Raises InvalidField or ImageMemoryFull."""
        _look(data, self.limits, self.field, reserve)
        source = images.header_size(data, self.limits, self.field)
        size = images.target_size(source, self.size_rule, self.multiple, self.limits)
        images.check_side(size, self.file_format)
        count = source[0] * source[1] + size[0] * size[1]
        each = _OF_JPEG if data.startswith(b"\xff\xd8\xff") else _BYTES_PER_PIXEL
        reserve(each * count, _SECONDS_PER_PIXEL * count)
        pixels = images.resize(images.decode(data, self.limits, self.field), size).tobytes()
        return Loaded(size, digest_of(size, pixels)), pixels


@dataclass(frozen=True, slots=True)
class Inspected:
    """What an image file is by its header, such as "image/png", and its SHA-256 in hexadecimal digits."""

    media_type: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Inspect:
    """Looks at an image file without decoding it. `field` is what errors name."""

    field: str
    limits: ImageLimits

    def run(self, data: bytes, reserve: Reserve) -> tuple[Inspected, bytes]:
        """What the file is, and no bytes. Raises InvalidField or ImageMemoryFull."""
        _look(data, self.limits, self.field, reserve)
        return Inspected(images.check_header(data, self.limits, self.field), hashlib.sha256(data).hexdigest()), b""


@dataclass(frozen=True, slots=True)
class Encode:
    """Encodes raw RGB pixels of so many columns and rows. `record` is written into the file, as images.encode has it."""

    size: tuple[int, int]
    file_format: WriteFormat
    quality: int
    record: str = ""

    def run(self, data: bytes, reserve: Reserve) -> tuple[None, bytes]:
        """The file."""
        pixels = self.size[0] * self.size[1]
        reserve(_BYTES_PER_PIXEL * pixels, 10 + 4e-6 * pixels)
        image = Image.frombuffer("RGB", self.size, data, "raw", "RGB", 0, 1)
        return None, images.encode(image, self.file_format, self.quality, self.record)


Job = LoadImage | Inspect | Encode


def digest_of(size: tuple[int, int], pixels: bytes) -> bytes:
    """16 bytes that tell an RGB image from every other one, whatever file it came in: a hash of its size and its pixels."""
    hashed = hashlib.blake2b(b"%d %d " % size, digest_size=_DIGEST_BYTES)
    hashed.update(pixels)
    return hashed.digest()


def _look(data: bytes, limits: ImageLimits, field: str, reserve: Reserve) -> None:
    """Bounds what reading the header may cost."""
    if len(data) > limits.max_bytes:
        return  # refused at once, with what the most is
    structure.check(data, field)
    pixels = structure.webp_pixels(data)
    if pixels > limits.max_source_pixels:
        raise InvalidField(field, f"the image has {pixels} pixels, the maximum is {limits.max_source_pixels}")
    reserve(_COPIES * len(data) + _WEBP_CANVAS * pixels, _SECONDS_PER_BYTE * len(data))


MOST = 64 * 2**10
"""Bytes of a message. Images are in files."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The process takes jobs."""


@dataclass(frozen=True, slots=True)
class Ask:
    """The job needs so many more bytes of memory. The answer is None, or the error that refuses them."""

    size: int


@dataclass(frozen=True, slots=True)
class JobDone:
    """The job's result, beside the bytes in a file that comes along if there are any."""

    value: object


@dataclass(frozen=True, slots=True)
class JobFailed:
    """The job's error."""

    error: Exception


Told = Ready | Ask | JobDone | JobFailed


def send(connection: socket.socket, message: object, *files: int) -> None:
    """Sends a message, with descriptors of files."""
    socket.send_fds(connection, [pickle.dumps(message)], files)


def file_of(data: bytes) -> int:
    """A descriptor, which the caller closes, of a file in memory that holds `data` and is read from its start.

    Raises StorageFailed if the system gives no such file or no room in it.
    """
    try:
        with _memory_file() as file:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
            file.seek(0)
            return os.dup(file.fileno())
    except OSError as error:
        raise StorageFailed(f"the server cannot store the bytes of an image: {error.strerror}") from error


def _memory_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("img2img-codec", os.MFD_CLOEXEC), "wb", buffering=0)
    return tempfile.TemporaryFile(buffering=0)

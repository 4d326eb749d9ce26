"""Jobs of a codec process (functions of bytes, without the event loop, gRPC or torch) and its messages to the server.

Messages are small and pickled. Images are passed in anonymous files.
"""

import hashlib
import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

from img2img_server import images
from img2img_server.codecs import structure
from img2img_server.errors import InvalidField, StorageFailed, root_of
from img2img_server.images import ImageLimits, MaskRule, SizeRule, WriteFormat
from img2img_server.images.sizes import centered_square, size_before_cut
from img2img_server.support.source_rule import EDITED, STRETCHED, SourceRule

Reserve = Callable[[int, float], None]
"""Requests memory in bytes and processor time in seconds, in addition to those of `advance`. Raises ImageMemoryFull."""

_BYTES_PER_PIXEL, _JPEG_BYTES_PER_PIXEL = 28, 16
"""Maximum memory of decoding: the decoder's own, its output, conversions to RGB and the upright image, mostly four bytes each.
Measured maximum: 26, for WebP and for TIFFs of floats. JPEGs, the format of most large sources, need less."""
_COPIES = 3
"""Maximum copies of the file: the received one, Pillow's, and a decoder's buffer."""
_WEBP_CANVAS = 8
"""Bytes per pixel that a WebP takes when it is opened: two canvases."""
_SECONDS_PER_PIXEL = 0.25e-6
_SECONDS_PER_BYTE = 0.25e-6
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Loaded:
    """The size of a decoded image as its model gets it, the digest of its pixels, and the size of the result; for a reference
    image, that of its file."""

    size: tuple[int, int]
    digest: bytes
    other_size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Decoding:
    """A job on an image file, within `limits`. Errors name `field`."""

    field: str
    limits: ImageLimits

    def advance(self, size: int) -> tuple[int, float]:
        """Memory in bytes and processor time in seconds to read the header of a file of `size` bytes; larger ones are refused."""
        return (_COPIES * size, _SECONDS_PER_BYTE * size) if size <= self.limits.max_bytes else (0, 0.0)


@dataclass(frozen=True, slots=True)
class LoadImage(_Decoding):
    """Decodes an image file and prepares it by `source_rule` for the result's size, rounded down to `multiple` pixels. Errors
    name `field`. The result must fit into a file of `file_format`. `sized_by` is the size of another image that the model derives
    the result's size from, None if that is this image."""

    size_rule: SizeRule
    multiple: int
    file_format: WriteFormat
    source_rule: SourceRule = STRETCHED
    sized_by: tuple[int, int] | None = None

    def run(self, data: bytes, reserve: Reserve) -> tuple[Loaded, bytes]:
        """Returns size and digest, and the raw RGB pixels. Raises InvalidField or ImageMemoryFull."""
        _check_structure(data, self.limits, self.field, reserve)
        source = images.header_size(data, self.limits, self.field)
        size = images.result_size(source, self.size_rule, self.source_rule, self.multiple, self.limits, self.sized_by)
        images.check_side(size, self.file_format)
        _reserve_pixels(data, source[0] * source[1] + size[0] * size[1], reserve)
        image = images.prepare(images.decode(data, self.limits, self.field), size, self.source_rule, self.limits)
        pixels = image.tobytes()
        return Loaded(image.size, digest_of(image.size, pixels), size), pixels


@dataclass(frozen=True, slots=True)
class LoadReference(_Decoding):
    """Decodes one of several images that a model reads: at its own size, or to the square of `side` pixels that CLIP's image
    encoder reads. Errors name `field`, or the list that contains it if the image has more than `pixels_left` pixels."""

    pixels_left: int
    side: int | None = None

    def run(self, data: bytes, reserve: Reserve) -> tuple[Loaded, bytes]:
        """Returns sizes and digest, and the raw RGB pixels. Raises InvalidField or ImageMemoryFull."""
        _check_structure(data, self.limits, self.field, reserve)
        source = images.header_size(data, self.limits, self.field)
        if source[0] * source[1] > self.pixels_left:
            reason = "the images have together too many pixels: send fewer or smaller ones"
            raise InvalidField(root_of(self.field), reason)
        square = (0, 0) if self.side is None else size_before_cut(source, self.side)
        _reserve_pixels(data, source[0] * source[1] + square[0] * square[1], reserve)
        image = images.decode(data, self.limits, self.field)
        own = images.prepare(image, source, EDITED, self.limits) if self.side is None else centered_square(image, self.side)
        pixels = own.tobytes()
        return Loaded(own.size, digest_of(own.size, pixels), source), pixels


@dataclass(frozen=True, slots=True)
class LoadMask(_Decoding):
    """Decodes an image file to a gray mask of `size`, by `rule`. Errors name `field`."""

    size: tuple[int, int]
    rule: MaskRule

    def run(self, data: bytes, reserve: Reserve) -> tuple[bytes, bytes]:
        """Returns the mask's digest, and its raw gray pixels. Raises InvalidField or ImageMemoryFull."""
        _check_structure(data, self.limits, self.field, reserve)
        width, height = images.header_size(data, self.limits, self.field)
        count = width * height + self.size[0] * self.size[1]
        reserve(_BYTES_PER_PIXEL * count, _SECONDS_PER_PIXEL * count)
        pixels = images.decode_mask(data, self.limits, self.field, self.rule, self.size).tobytes()
        return digest_of(self.size, pixels), pixels


@dataclass(frozen=True, slots=True)
class Inspected:
    """An image file's media type by its header, such as "image/png", and its SHA-256 in hexadecimal digits."""

    media_type: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Inspect(_Decoding):
    """Inspects an image file without decoding it. Errors name `field`."""

    def run(self, data: bytes, reserve: Reserve) -> tuple[Inspected, bytes]:
        """Returns the file's type and hash, and no bytes. Raises InvalidField or ImageMemoryFull."""
        _check_structure(data, self.limits, self.field, reserve)
        return Inspected(images.check_header(data, self.limits, self.field), hashlib.sha256(data).hexdigest()), b""


@dataclass(frozen=True, slots=True)
class Encode:
    """Encodes raw RGB pixels of `size` (width, height). `record` is written into the file as by images.encode."""

    size: tuple[int, int]
    file_format: WriteFormat
    quality: int
    record: str = ""

    def advance(self, size: int) -> tuple[int, float]:
        """Memory in bytes and processor time in seconds of the whole job."""
        pixels = self.size[0] * self.size[1]
        return _BYTES_PER_PIXEL * pixels, 10 + 4e-6 * pixels

    def run(self, data: bytes, reserve: Reserve) -> tuple[None, bytes]:
        """Returns the file's bytes."""
        return None, images.encode_pixels(data, self.size, self.file_format, self.quality, self.record)


Job = LoadImage | LoadReference | LoadMask | Inspect | Encode


def digest_of(size: tuple[int, int], pixels: bytes) -> bytes:
    """A 16-byte hash of an image's size and pixels, which does not depend on the file's format."""
    hashed = hashlib.blake2b(b"%d %d " % size, digest_size=_DIGEST_BYTES)
    hashed.update(pixels)
    return hashed.digest()


def _reserve_pixels(data: bytes, count: int, reserve: Reserve) -> None:
    each = _JPEG_BYTES_PER_PIXEL if data.startswith(b"\xff\xd8\xff") else _BYTES_PER_PIXEL
    reserve(each * count, _SECONDS_PER_PIXEL * count)


def _check_structure(data: bytes, limits: ImageLimits, field: str, reserve: Reserve) -> None:
    """Limits the cost of reading the header."""
    if len(data) > limits.max_bytes:
        return  # refused later, with an error that states the limit
    structure.check(data, field)
    pixels = structure.webp_pixels(data)
    if pixels > limits.max_source_pixels:
        raise InvalidField(field, f"the image has {pixels} pixels, the maximum is {limits.max_source_pixels}")
    if pixels:
        reserve(_WEBP_CANVAS * pixels, 0.0)


MOST = 64 * 2**10
"""Maximum bytes of a message. Images are in files."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The process accepts jobs."""


@dataclass(frozen=True, slots=True)
class Begin:
    """A job, which may use `size` bytes of memory and `seconds` of processor time, in addition to those of a small image. Its
    file is sent with the message."""

    job: Job
    size: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Ask:
    """The job needs `size` more bytes of memory. The server answers with None, or with the error that refuses them."""

    size: int


@dataclass(frozen=True, slots=True)
class JobDone:
    """The job's result. Its bytes, if any, are in a file sent with the message."""

    value: object


@dataclass(frozen=True, slots=True)
class JobFailed:
    """The job's error."""

    error: Exception


WorkerMessage = Ready | Ask | JobDone | JobFailed


def send(connection: socket.socket, message: object, *files: int) -> None:
    """Sends a message with file descriptors."""
    socket.send_fds(connection, [pickle.dumps(message)], files)


def file_of(data: bytes) -> int:
    """Writes `data` to a file in memory. Returns its descriptor, positioned at the start, which the caller closes.

    Raises StorageFailed if the file cannot be created or written.
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

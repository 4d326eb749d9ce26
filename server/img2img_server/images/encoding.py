"""Encodes pixels to image files."""

import io
import struct
from typing import Literal

from PIL import Image

from img2img_server.errors import InvalidField
from img2img_server.images import provenance

WriteFormat = Literal["PNG", "JPEG", "WEBP"]

_MAX_SIDE: dict[WriteFormat, int] = {"PNG": 2**31 - 1, "JPEG": 65500, "WEBP": 16383}  # limits of zlib, libjpeg-turbo and libwebp


def holds(size: tuple[int, int], file_format: WriteFormat) -> bool:
    """Whether the format supports an image of this width and height, in pixels."""
    return max(size) <= _MAX_SIDE[file_format]


def check_side(size: tuple[int, int], file_format: WriteFormat) -> None:
    """Raises InvalidField if the format does not support this width and height, in pixels."""
    if not holds(size, file_format):
        most, fits = _MAX_SIDE[file_format], ", ".join(name for name in _MAX_SIDE if holds(size, name))
        raise InvalidField(
            "output.format",
            f"{file_format} supports at most {most} pixels per side, but the result would have {size[0]} x {size[1]}: "
            f"choose {fits}, or a smaller size",
        )


def encode(image: Image.Image, file_format: WriteFormat, quality: int, record: str = "") -> bytes:
    """Encodes an image. `quality`, 1 to 100, applies to JPEG and WebP; WebP at 100 is lossless. PNG favours speed over size.

    `record` is a JSON object to write into the file (provenance.py), empty for none.
    """
    if file_format == "PNG" and image.mode == "RGB":
        return _png(image.tobytes(), image.size, record)
    file = io.BytesIO()
    if file_format == "PNG":
        image.save(file, "PNG", compress_level=1, pnginfo=provenance.png_info(record) if record else None)
    else:
        options = {"method": 0, "lossless": quality == 100} if file_format == "WEBP" else {}
        image.save(file, file_format, quality=quality, xmp=provenance.xmp(record) if record else b"", **options)
    return file.getvalue()


def encode_pixels(pixels: bytes, size: tuple[int, int], file_format: WriteFormat, quality: int, record: str = "") -> bytes:
    """Encodes raw RGB pixels of `size` (width, height), as encode() does."""
    if file_format == "PNG":
        return _png(pixels, size, record)
    return encode(Image.frombuffer("RGB", size, pixels, "raw", "RGB", 0, 1), file_format, quality, record)


_UP = 2
"""The PNG filter that stores each pixel's difference from the one above."""
_ROWS = 256
"""Rows that are filtered and compressed at a time, which bounds the memory for large images."""
_LEVEL = 2
"""ISA-L's levels are 0 to 3: 2 has files as small as zlib's level 1, and 3 is slower on smooth images."""


def _png(pixels: bytes, size: tuple[int, int], record: str) -> bytes:
    """Raw RGB pixels as a PNG.

    Pillow tries five filters for each row, which takes longer than to compress it. Here all rows have one filter, and ISA-L
    compresses them: files of about the same size in a quarter of the time (docs/benchmarks.md), which are also quicker to decode.
    """
    from isal import isal_zlib

    texts = provenance.png_info(record).chunks if record else ()
    header = struct.pack(">2I5B", *size, 8, 2, 0, 0, 0)  # 8 bits each of red, green and blue
    chunks = [(b"IHDR", header), *((item[0], item[1]) for item in texts)]
    file = io.BytesIO()
    file.write(b"\x89PNG\r\n\x1a\n")
    for name, content in (*chunks, (b"IDAT", _compressed(pixels, size)), (b"IEND", b"")):
        check = isal_zlib.crc32(content, isal_zlib.crc32(name))
        file.write(b"".join([struct.pack(">I", len(content)), name, content, struct.pack(">I", check)]))
    return file.getvalue()


def _compressed(pixels: bytes, size: tuple[int, int]) -> bytes:
    """The filtered and compressed rows of raw RGB pixels."""
    import numpy as np  # here: importing it takes longer than all other imports of the configuration
    from isal import isal_zlib

    width, height = size
    image = np.frombuffer(pixels, np.uint8).reshape(height, 3 * width)
    compressor, found = isal_zlib.compressobj(_LEVEL), []
    for start in range(0, height, _ROWS):
        part = image[start : start + _ROWS]
        rows = np.empty((len(part), 1 + part.shape[1]), np.uint8)
        rows[:, 0] = _UP
        rows[0, 1:] = part[0] - image[start - 1] if start else part[0]
        np.subtract(part[1:], part[:-1], out=rows[1:, 1:])
        found.append(compressor.compress(rows.data))
    return b"".join([*found, compressor.flush()])

"""Encodes pixels to image files."""

import io
import struct
import zlib
from typing import Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

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
    file = io.BytesIO()
    if file_format == "PNG" and image.mode == "RGB":
        return _png(image, provenance.png_info(record) if record else None)
    if file_format == "PNG":
        image.save(file, "PNG", compress_level=1, pnginfo=provenance.png_info(record) if record else None)
    else:
        options = {"method": 0, "lossless": quality == 100} if file_format == "WEBP" else {}
        image.save(file, file_format, quality=quality, xmp=provenance.xmp(record) if record else b"", **options)
    return file.getvalue()


_UP = 2
"""The PNG filter that stores each pixel's difference from the one above."""
_ROWS = 256
"""Rows that are filtered and compressed at a time, which bounds the memory for large images."""


def _png(image: Image.Image, texts: PngInfo | None) -> bytes:
    """An RGB image as a PNG.

    Pillow tries five filters for each row, which takes longer than to compress it. Here all rows have one filter, for files of
    about the same size in half the time (`scripts/bench codecs`), which are also quicker to decode.
    """
    width, height = image.size
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)  # 8 bits each of red, green and blue
    chunks = [(b"IHDR", header), *((item[0], item[1]) for item in (texts.chunks if texts else ()))]
    file = io.BytesIO()
    file.write(b"\x89PNG\r\n\x1a\n")
    for name, content in (*chunks, (b"IDAT", _compressed(image)), (b"IEND", b"")):
        check = zlib.crc32(content, zlib.crc32(name))
        file.write(struct.pack(">I", len(content)) + name + content + struct.pack(">I", check))
    return file.getvalue()


def _compressed(image: Image.Image) -> bytes:
    """The filtered and compressed rows of an RGB image."""
    import numpy as np  # here: importing it takes longer than all other imports of the configuration

    pixels = np.asarray(image).reshape(image.height, 3 * image.width)
    compressor, found = zlib.compressobj(1), []
    for start in range(0, image.height, _ROWS):
        part = pixels[start : start + _ROWS]
        above = pixels[start - 1 : start - 1 + len(part)] if start else np.concatenate([np.zeros_like(part[:1]), part[:-1]])
        rows = np.full((len(part), 1 + part.shape[1]), _UP, np.uint8)
        np.subtract(part, above, out=rows[:, 1:])
        found.append(compressor.compress(rows.data))
    return b"".join([*found, compressor.flush()])

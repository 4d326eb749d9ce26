"""Pixels -> image files."""

import io
from typing import Literal

from PIL import Image

from img2img_server.errors import InvalidField
from img2img_server.images import provenance

WriteFormat = Literal["PNG", "JPEG", "WEBP"]

_MAX_SIDE: dict[WriteFormat, int] = {"PNG": 2**31 - 1, "JPEG": 65500, "WEBP": 16383}  # of zlib's, libjpeg-turbo's and libwebp's


def holds(size: tuple[int, int], file_format: WriteFormat) -> bool:
    """Whether the format can hold an image of this width and height, in pixels."""
    return max(size) <= _MAX_SIDE[file_format]


def check_side(size: tuple[int, int], file_format: WriteFormat) -> None:
    """Raises InvalidField for a width and height, in pixels, that the format cannot hold."""
    if not holds(size, file_format):
        most, fits = _MAX_SIDE[file_format], ", ".join(name for name in _MAX_SIDE if holds(size, name))
        raise InvalidField(
            "output.format",
            f"{file_format} holds at most {most} pixels a side, and the result would have {size[0]} x {size[1]}: "
            f"choose {fits}, or a smaller size",
        )


def encode(image: Image.Image, file_format: WriteFormat, quality: int, record: str = "") -> bytes:
    """Encodes an image. `quality` is 1 to 100, for JPEG and WebP; WebP at 100 is lossless. PNG favours speed over size.

    `record` is the JSON object that provenance.py writes into the file; empty for none.
    """
    file = io.BytesIO()
    if file_format == "PNG":
        image.save(file, "PNG", compress_level=1, pnginfo=provenance.png_info(record) if record else None)
    else:
        options = {"method": 0, "lossless": quality == 100} if file_format == "WEBP" else {}
        image.save(file, file_format, quality=quality, xmp=provenance.xmp(record) if record else b"", **options)
    return file.getvalue()

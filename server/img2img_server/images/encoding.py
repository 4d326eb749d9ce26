"""Encodes pixels to image files."""

import io
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
    file = io.BytesIO()
    if file_format == "PNG":
        image.save(file, "PNG", compress_level=1, pnginfo=provenance.png_info(record) if record else None)
    else:
        options = {"method": 0, "lossless": quality == 100} if file_format == "WEBP" else {}
        image.save(file, file_format, quality=quality, xmp=provenance.xmp(record) if record else b"", **options)
    return file.getvalue()

"""Bytes <-> pixels: decodes whatever Pillow reads into upright RGB, within limits, and encodes results."""

import base64
import binascii
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from img2img_server.errors import InvalidField
from img2img_server.settings.setting import setting

READ_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
WriteFormat = Literal["PNG", "JPEG", "WEBP"]

# Pillow warns at one size and fails at twice that. decode() looks at the header and refuses on its own terms, before pixels.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """The largest source file in bytes, the largest source and the largest result in pixels."""

    max_bytes: int = setting(16 * 2**20, "largest source file", metavar="BYTES", name="max_image_bytes", least=1)
    max_source_pixels: int = setting(32_000_000, "largest source picture, width x height", metavar="N", least=1)
    max_pixels: int = setting(2048 * 2048, "largest result, width x height", metavar="N", least=1)


def decode(data: bytes, limits: ImageLimits, field: str) -> Image.Image:
    """Decodes a picture file to upright RGB at its own size. An animation gives its first frame; transparency becomes white.

    Raises InvalidField, naming `field`, for a file that is empty, too large, of no known format or damaged.
    """
    with _reading(field):
        image = _open(data, limits, field)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def check_header(data: bytes, limits: ImageLimits, field: str) -> str:
    """The media type of a picture file, such as "image/png", by its header alone.

    Raises InvalidField, naming `field`, for a file that is empty, too large, of no known format or of too many pixels.
    """
    with _reading(field):
        image = _open(data, limits, field)
        assert image.format is not None, "what is opened has a format"
        return Image.MIME[image.format]


def header_size(data: bytes, limits: ImageLimits, field: str) -> tuple[int, int]:
    """Width and height of a picture file by its header alone, as they are stored: one that lies on its side is not yet upright.

    Raises InvalidField as decode does, but for a file that is damaged behind its header.
    """
    with _reading(field):
        return _open(data, limits, field).size


def media_type(head: bytes) -> str | None:
    """The media type that the first bytes of a file tell, 32 are enough; None where it is of none of READ_FORMATS."""
    Image.init()
    for name in READ_FORMATS:
        accepts = Image.OPEN[name][1]
        if accepts is not None and accepts(head) is True:
            return Image.MIME[name]
    return None


def _open(data: bytes, limits: ImageLimits, field: str) -> Image.Image:
    if not data:
        raise InvalidField(field, "the picture is empty")
    if len(data) > limits.max_bytes:
        raise InvalidField(field, f"the file has {len(data)} bytes, the most is {limits.max_bytes}")
    image = Image.open(io.BytesIO(data), formats=READ_FORMATS)
    if image.width * image.height > limits.max_source_pixels:
        raise InvalidField(
            field, f"the picture has {image.width} x {image.height} pixels, the most is {limits.max_source_pixels}"
        )
    return image


@contextmanager
def _reading(field: str) -> Iterator[None]:
    """Within the block, what Pillow raises is InvalidField."""
    try:
        yield
    except UnidentifiedImageError:
        raise InvalidField(field, f"not a picture in a known format ({', '.join(READ_FORMATS)})") from None
    # Pillow's decoders raise what their format makes them raise; each of these was seen on a damaged file.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, OverflowError) as error:
        raise InvalidField(field, f"the picture cannot be decoded: {error}") from None


def decode_data_uri(uri: str, limits: ImageLimits, field: str) -> bytes:
    """The bytes in a "data:" URI (RFC 2397). Raises InvalidField, naming `field`, for one that is malformed or too large."""
    header, comma, body = uri.partition(",")
    if not comma:
        raise InvalidField(field, "a data: URI needs a comma before its data")
    if len(body) > 4 * limits.max_bytes:
        raise InvalidField(field, f"the URI has {len(body)} characters, too many for a file of {limits.max_bytes} bytes")
    # As unquote_to_bytes, but for escapes that are none: that takes seconds and gigabytes where everything is escaped.
    raw = binascii.a2b_qp(body.encode().replace(b"=", b"=3D").replace(b"%", b"=")) if "%" in body else body.encode()
    if not header.endswith(";base64"):
        return raw
    try:
        return base64.b64decode(raw, validate=True)
    except binascii.Error as error:
        raise InvalidField(field, f"the base64 data is malformed: {error}") from None


def target_size(
    source: tuple[int, int], width: int | None, height: int | None, multiple: int, limits: ImageLimits
) -> tuple[int, int]:
    """The size of the result: what was asked, else the source's, rounded down to the model's multiple, in pixels.

    Raises InvalidField where that is too large or nothing.
    """
    sizes = []
    for field, asked, own in (("width", width, source[0]), ("height", height, source[1])):
        wanted = own if asked is None else asked
        if wanted < multiple:
            name = "image" if asked is None else field
            raise InvalidField(name, f"{field} is {wanted} pixels, the least for this model is {multiple}")
        sizes.append(wanted - wanted % multiple)
    if sizes[0] * sizes[1] > limits.max_pixels:
        name = "image" if width is None and height is None else "width" if width is not None else "height"
        raise InvalidField(
            name,
            f"the result would have {sizes[0]} x {sizes[1]} pixels, the most is {limits.max_pixels}: "
            "set width and height for a smaller one",
        )
    return sizes[0], sizes[1]


def check_stored_size(stored: tuple[int, int], width: int | None, height: int | None, multiple: int, limits: ImageLimits) -> None:
    """Raises what target_size does where that is sure before a picture is upright: whichever way up it turns out to be."""
    try:
        target_size(stored[::-1], width, height, multiple, limits)
    except InvalidField:
        target_size(stored, width, height, multiple, limits)


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes as diffusers' VaeImageProcessor does (Lanczos, stretched), so that it finds nothing left to do."""
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def encode(image: Image.Image, file_format: WriteFormat, quality: int) -> bytes:
    """Encodes a picture. `quality` is 1 to 100, for JPEG and WebP; WebP at 100 is lossless. PNG favours speed over size."""
    file = io.BytesIO()
    if file_format == "PNG":
        image.save(file, "PNG", compress_level=1)
    elif file_format == "JPEG":
        image.save(file, "JPEG", quality=quality)
    else:
        image.save(file, "WEBP", quality=quality, method=0, lossless=quality == 100)
    return file.getvalue()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_gray(image).convert("RGB")
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        assert converted is not None, "not asked to work in place"
        return converted
    if image.has_transparency_data:
        if image.mode in ("La", "RGBa"):
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        return canvas.convert("RGB")
    return image.convert("RGB")


def _deep_gray(image: Image.Image) -> Image.Image:
    """Gray of 16 or 32 bits, or of floats (0 to 1, or 0 to 255), to 8 bits. Pillow's own conversion would clip, not scale."""
    image = image if image.mode == "F" else image.convert("I")
    highest = float(image.getextrema()[1])  # type: ignore[arg-type]
    full_scales = (1.0, 255.0) if image.mode == "F" else (65535.0, highest)
    full = full_scales[highest > full_scales[0]]
    return image.point(lambda value: value * (255 / full)).convert("L")

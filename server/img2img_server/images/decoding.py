"""Decodes image files and data: URIs to upright sRGB pixels, within limits."""

import base64
import binascii
import ctypes
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from PIL import Image, ImageCms, UnidentifiedImageError, _imaging

from img2img_server.errors import InvalidField
from img2img_server.images.essentials import Essentials, essentials, lies_on_its_side, read_orientation, turn_upright
from img2img_server.images.masks import MaskRule, prepare_mask
from img2img_server.images.sizes import ImageLimits

READ_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_MEDIA_TYPE = {name: f"image/{name.lower()}" for name in READ_FORMATS}
_MEDIA_TYPE["DIB"], _MEDIA_TYPE["MPO"] = _MEDIA_TYPE["BMP"], _MEDIA_TYPE["JPEG"]

# Disables Pillow's own limit, at which it only warns. decode() checks the header against ImageLimits before it decodes.
Image.MAX_IMAGE_PIXELS = None


def _silence_decoders() -> None:
    """Prevents decoders from writing about clients' files to standard error. Callers get an error instead."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # libtiff writes from C. Its functions are looked up in Pillow's extension, which links it. Builds that hide them cannot be
    # silenced.
    library = ctypes.CDLL(_imaging.__file__)
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        with suppress(AttributeError):
            set_handler = getattr(library, name)
            set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            set_handler(None)


_silence_decoders()


def decode(data: bytes, limits: ImageLimits, field: str) -> Image.Image:
    """Decodes an image file to RGB of shape (height, width, 3) at its own size: upright by its EXIF orientation, in sRGB by its
    ICC profile. Of an animation it decodes the first frame; transparency becomes white. Other metadata is ignored.

    Raises InvalidField, naming `field`, if the file is empty, too large, damaged, or in an unknown format.
    """
    with _reading(field):
        image, file = _open(data, limits, field)
        image.load()
        return turn_upright(to_srgb(image, file.profile), read_orientation(file.exif))


def decode_mask(data: bytes, limits: ImageLimits, field: str, rule: MaskRule, size: tuple[int, int]) -> Image.Image:
    """Decodes an image file to a mask in mode L of `size`, by `rule`: upright, without color management, because a mask's values
    are not colors.

    Raises InvalidField as decode does, and for a mask that `rule` does not fit.
    """
    with _reading(field):
        image, file = _open(data, limits, field)
        image.load()
        orientation = read_orientation(file.exif)
        values = to_srgb(image, b"").convert("L") if not rule.by_alpha else _split(image)[1]
        if values is None:
            raise InvalidField(field, "the mask has no transparency: make the area to redraw transparent, in a PNG or WebP file")
        return prepare_mask(turn_upright(values, orientation), rule, size)


def check_header(data: bytes, limits: ImageLimits, field: str) -> str:
    """The media type of an image file, such as "image/png". Reads only the header.

    Raises InvalidField, naming `field`, if the file is empty, too large, in an unknown format or has too many pixels.
    """
    with _reading(field):
        image, _ = _open(data, limits, field)
        assert image.format is not None, "opened files have a format"
        return _MEDIA_TYPE[image.format]


def header_size(data: bytes, limits: ImageLimits, field: str) -> tuple[int, int]:
    """The width and height that decode() returns. Reads only the header.

    Raises InvalidField as decode does, except for damage after the header.
    """
    with _reading(field):
        image, file = _open(data, limits, field)
        return image.size[::-1] if lies_on_its_side(read_orientation(file.exif)) else image.size


def media_type(head: bytes) -> str | None:
    """The media type by the first 32 bytes of a file; None if the format is not in READ_FORMATS."""
    Image.init()
    for name in READ_FORMATS:
        accepts = Image.OPEN[name][1]
        if accepts is not None and accepts(head) is True:
            return _MEDIA_TYPE[name]
    return None


def _open(data: bytes, limits: ImageLimits, field: str) -> tuple[Image.Image, Essentials]:
    if not data:
        raise InvalidField(field, "the image is empty")
    if len(data) > limits.max_bytes:
        raise InvalidField(field, f"the file has {len(data)} bytes, the maximum is {limits.max_bytes}")
    file = essentials(data)
    image = Image.open(io.BytesIO(file.data), formats=READ_FORMATS)
    if image.width * image.height > limits.max_source_pixels:
        raise InvalidField(
            field,
            f"the image has {image.width} x {image.height} pixels, the maximum is {limits.max_source_pixels}: send a smaller one",
        )
    return image, file


@contextmanager
def _reading(field: str) -> Iterator[None]:
    """Converts Pillow's exceptions in the block to InvalidField."""
    try:
        yield
    except (InvalidField, MemoryError):
        raise
    except UnidentifiedImageError:
        raise InvalidField(field, f"the file is not an image in a supported format ({', '.join(READ_FORMATS)})") from None
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise anything on a damaged file, also AssertionError
        raise InvalidField(field, f"the image cannot be decoded: {error}") from None


_SPACE_OF_MODE = {"L": b"GRAY", "RGB": b"RGB ", "CMYK": b"CMYK"}
_SPACE_OFFSET = 16  # in a profile's header
_SRGB_TOLERANCE = 2
_FLOAT_TOLERANCE, _WHITE_FLOAT = 1.5, 16.0
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _UNSIGNED = 0, (1,)


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Converts an image in any of Pillow's modes to sRGB, in mode RGB. Transparency becomes white.

    `profile` is an ICC profile, empty if there is none. A damaged profile, or one for another colour space, is ignored.
    """
    image, alpha = _split(image)
    image = _convert(image, profile)
    if alpha is None:
        return image
    image.putalpha(alpha)
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    return canvas.convert("RGB")


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours, in mode L, RGB, CMYK or LAB, and the transparency."""
    if image.mode.startswith("I") or image.mode == "F":
        return _shallow(image)
    if image.mode in ("CMYK", "LAB"):
        return image, None
    image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode))
    gray = image.mode in ("1", "L", "LA")
    if not image.has_transparency_data:
        return image.convert("L" if gray else "RGB"), None
    image = image.convert("LA" if gray else "RGBA")
    return image.convert("L" if gray else "RGB"), image.getchannel("A")


def _shallow(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Converts gray of more than 8 bits to 8 bits. Pillow's own conversion clips instead of scaling.

    Integers of a known depth, 12 or 16 bits, are scaled by it. Most files of 32 bits use fewer: white is 2^n - 1 for the least n,
    at least 8, that holds the brightest value. Floats with values up to 16 have white at 1.0, and brighter highlights are
    clipped; floats with larger values are treated as integers, with 1.5 times white allowed as overshoot.
    """
    import numpy as np  # here: importing it takes longer than all other imports of the configuration

    tags: Any = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode == "I" and tags and tags.get(_SAMPLE_FORMAT, _UNSIGNED) == _UNSIGNED:
        values = values.view(np.uint32)  # Pillow reads them as signed.
    transparent = image.info.get("transparency")
    alpha = None if transparent is None else Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    gray = values.astype(np.float32)  # One copy, changed in place, since a source may have millions of pixels.
    np.nan_to_num(gray, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    gray *= 255 / _white(image.mode, float((gray if image.mode == "F" else values).max()), tags)
    np.clip(gray, 0, 255, out=gray)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        np.subtract(255, gray, out=gray)
    return Image.fromarray(np.rint(gray, out=gray).astype(np.uint8)), alpha


def _white(mode: str, brightest: float, tags: Any) -> float:
    if mode not in ("I", "F"):
        (bits, *_) = tags.get(_BITS_PER_SAMPLE, (16,))
        return float(2**bits - 1)
    if mode == "F" and brightest <= _WHITE_FLOAT:
        return 1.0
    bits, tolerance = 8, _FLOAT_TOLERANCE if mode == "F" else 1.0
    while (2**bits - 1) * tolerance < brightest:
        bits += 1
    return float(2**bits - 1)


def _convert(image: Image.Image, profile: bytes) -> Image.Image:
    if image.mode == "LAB":
        return _transform(image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
    space = profile[_SPACE_OFFSET : _SPACE_OFFSET + 4]
    if image.mode == "L" and space == b"RGB ":
        image = image.convert("RGB")
    if space == _SPACE_OF_MODE[image.mode]:
        try:
            return _managed(image, profile)
        except (OSError, ImageCms.PyCMSError, ValueError):
            pass  # damaged
    return image.convert("RGB")


def _managed(image: Image.Image, profile: bytes) -> Image.Image:
    import numpy as np  # here: importing it takes longer than all other imports of the configuration

    source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    samples = _samples(image.mode)
    if samples is not None:
        # Most profiles are sRGB, and a conversion would only add rounding errors.
        converted = _transform(samples, source, srgb)
        if np.abs(np.asarray(converted, int) - np.asarray(samples.convert("RGB"), int)).max() <= _SRGB_TOLERANCE:
            return image.convert("RGB")
    return _transform(image, source, srgb)


def _samples(mode: str) -> Image.Image | None:
    """Sample colours across the mode's range, None for CMYK, which cannot be sRGB."""
    import numpy as np  # here: importing it takes longer than all other imports of the configuration

    if mode == "CMYK":
        return None
    steps = np.arange(0, 256, 15 if mode == "L" else 51, dtype=np.uint8)
    if mode == "L":
        return Image.fromarray(steps[None])
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3))


def _transform(image: Image.Image, source: Any, target: Any) -> Image.Image:
    converted = ImageCms.profileToProfile(
        image,
        source,
        target,
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    assert converted is not None, "only in-place conversion returns None"
    return converted


def decode_data_uri(uri: str, limits: ImageLimits, field: str) -> bytes:
    """The bytes in a "data:" URI (RFC 2397). Raises InvalidField, naming `field`, if it is malformed or too large."""
    header, comma, body = uri.partition(",")
    if not comma:
        raise InvalidField(field, "a data: URI needs a comma before its data")
    if len(body) > 4 * limits.max_bytes:
        raise InvalidField(field, f"the URI has {len(body)} characters, too many for a file of {limits.max_bytes} bytes")
    # Like unquote_to_bytes except for malformed escapes, but without its seconds and gigabytes if everything is escaped.
    raw = binascii.a2b_qp(body.encode().replace(b"=", b"=3D").replace(b"%", b"=")) if "%" in body else body.encode()
    if not header.endswith(";base64"):
        return raw
    try:
        return base64.b64decode(raw, validate=True)
    except binascii.Error as error:
        raise InvalidField(field, f"the base64 data is malformed: {error}") from None

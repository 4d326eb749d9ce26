"""Images of the page: validated and, if too large for servers, reduced when uploaded; then stored and served unchanged."""

import io
import re
import secrets
import warnings
from dataclasses import dataclass, field

from img2img_client import read_provenance
from PIL import Image, ImageOps

from img2img_playground.settings import Settings

MAX_BYTES = 32 * 2**20
"""Maximum bytes of a file."""

MAX_PIXELS = 100_000_000
"""Maximum pixels of an image, which has to be decoded."""

MOST_SENT_PIXELS, MOST_SENT_BYTES = 32_000_000, 16 * 2**20
"""The default limits of servers. Larger images are reduced."""

REDUCED_SIDE = 4096
"""The longest side of a reduced image in pixels: more than any model uses."""

_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""PNG chunks that Pillow refuses if they are large, and that are not needed here."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Formats that the server reads and all browsers display."""

_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112
_LONGEST_NAME = 80
_RECORD = b"img2img"
"""Part of every record's key."""
_LONGEST_PROBLEM = 200


class UnusableImage(Exception):
    """A file that the page cannot use as an image. The text is shown to the user."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file. `width` and `height` are in pixels after EXIF orientation; `name` has no directory."""

    name: str
    media_type: str
    width: int
    height: int
    data: bytes = field(repr=False)
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return self.name.rpartition(".")[0] or self.name


def read_image(data: bytes, name: str) -> ImageFile:
    """Reads a file's header without decoding pixels. Raises UnusableImage."""
    if not data:
        raise UnusableImage("The file is empty.")
    if len(data) > MAX_BYTES:
        raise UnusableImage(f"The file is larger than {MAX_BYTES // 2**20} MiB.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The size is checked below, and malformed metadata does not matter.
            image = Image.open(io.BytesIO(_without_texts(data)), formats=FORMATS)
    except Image.DecompressionBombError:
        raise UnusableImage(f"The image has more than {MAX_PIXELS // 10**6} million pixels.") from None
    except Exception:  # noqa: BLE001 - Pillow raises anything for a malformed header
        raise UnusableImage(f"This is not an image in a supported format: {', '.join(FORMATS)}.") from None
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UnusableImage(f"The image has {width} x {height} pixels; the maximum is {MAX_PIXELS // 10**6} million.")
        assert image.format is not None, "an opened image has a format"
        if _is_rotated(image):
            width, height = height, width
        kind = "jpeg" if image.format == "MPO" else image.format.lower()  # Pillow's name for a JPEG of several images
        return ImageFile(_tidy(name) or f"image.{kind}", f"image/{kind}", width, height, data)


def reduce(image: ImageFile) -> ImageFile:
    """A smaller image, upright, in place of one that is beyond the default limits of servers. Decodes the image.

    Raises UnusableImage.
    """
    if image.width * image.height <= MOST_SENT_PIXELS and len(image.data) <= MOST_SENT_BYTES:
        return image
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(_without_texts(image.data)), formats=FORMATS) as opened:
                opened.draft("RGB", (REDUCED_SIDE, REDUCED_SIDE))
                clear = opened.has_transparency_data
                small = ImageOps.exif_transpose(opened).convert("RGBA" if clear else "RGB")
    except Exception:  # noqa: BLE001 - Pillow raises anything for damaged pixels
        raise UnusableImage("The image is damaged: it cannot be decoded.") from None
    small.thumbnail((REDUCED_SIDE, REDUCED_SIDE), Image.Resampling.LANCZOS, reducing_gap=3)
    file, kind = io.BytesIO(), "webp" if clear else "jpeg"
    small.save(file, kind, quality=95)
    return ImageFile(f"{image.stem}-reduced.{kind}", f"image/{kind}", *small.size, file.getvalue())


def read_settings(data: bytes) -> Settings | None:
    """The settings that a server recorded in its image file, None if there are none. Decodes the image.

    Raises ValueError if the record is damaged.
    """
    if _RECORD not in data:
        return None
    try:
        record = read_provenance(data)
        return None if record is None else Settings.from_record(record)
    except ValueError as error:
        raise ValueError(str(error)[:_LONGEST_PROBLEM]) from None


def _without_texts(data: bytes) -> bytes:
    """A PNG without its text chunks; any other file unchanged."""
    if not data.startswith(_PNG):
        return data
    kept, at = [_PNG], len(_PNG)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        if data[at + 4 : at + 8] not in _TEXTS:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _is_rotated(image: Image.Image) -> bool:
    """Whether the EXIF orientation rotates the image by 90 degrees. Reads the header only: getexif() of a PNG decodes pixels."""
    exif = image.info.get("exif")
    if not isinstance(exif, bytes):
        return False
    tags = Image.Exif()
    try:
        tags.load(exif)
        return tags.get(_ORIENTATION) in (5, 6, 7, 8)
    except Exception:  # noqa: BLE001 - Pillow raises anything for malformed EXIF; the pixels may be good.
        return False


def _tidy(name: str) -> str:
    """The name without directories and unprintable characters, shortened but with its suffix."""
    name = re.split(r"[/\\]", name)[-1]
    name = "".join(letter for letter in name if letter.isprintable()).strip().lstrip(".")
    stem, dot, suffix = name.rpartition(".")
    return (
        name
        if len(name) <= _LONGEST_NAME
        else f"{(stem or suffix)[:_LONGEST_NAME]}{dot if stem else ''}{suffix[:8] if stem else ''}"
    )

"""Pictures that the page shows: checked once when they come in, then only kept and sent."""

import io
import re
import secrets
import warnings
from dataclasses import dataclass, field

from PIL import Image

MAX_BYTES = 32 * 2**20
"""Of one file. A server takes 16 MiB unless its operator says otherwise; what is beyond its limit, it refuses itself."""

MAX_PIXELS = 100_000_000
"""Of one image: what a browser would have to decode. A server's own limit is 32 million unless its operator says otherwise."""

_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""Chunks of a PNG that Pillow refuses if they are large, and that nothing here needs."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What both a server reads and every browser shows."""

_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112
_LONGEST_NAME = 80


class UnusablePicture(Exception):
    """A file that the page cannot use as an image. The text is shown to the user."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image's file. `width` and `height` are in pixels, upright; `name` is a file's name without a folder."""

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


def read_picture(data: bytes, name: str) -> Picture:
    """Looks at a file's header, decodes no pixels. Raises UnusablePicture."""
    if not data:
        raise UnusablePicture("The file is empty.")
    if len(data) > MAX_BYTES:
        raise UnusablePicture(f"The file is larger than {MAX_BYTES // 2**20} MiB.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # What is too large is found below, and malformed metadata does not matter.
            image = Image.open(io.BytesIO(_without_texts(data)), formats=FORMATS)
    except Image.DecompressionBombError:
        raise UnusablePicture(f"The picture has more than {MAX_PIXELS // 10**6} million pixels.") from None
    except Exception:  # noqa: BLE001 - Pillow raises anything for a malformed header
        raise UnusablePicture(f"This is no picture in a format that works here: {', '.join(FORMATS)}.") from None
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UnusablePicture(f"The picture has {width} x {height} pixels, the most is {MAX_PIXELS // 10**6} million.")
        assert image.format is not None, "what is opened has a format"
        if _lies_on_its_side(image):
            width, height = height, width
        kind = "jpeg" if image.format == "MPO" else image.format.lower()  # Pillow's name for a JPEG of several images
        return Picture(_tidy(name) or f"picture.{kind}", f"image/{kind}", width, height, data)


def _without_texts(data: bytes) -> bytes:
    """A PNG without its texts, any other file as it is."""
    if not data.startswith(_PNG):
        return data
    kept, at = [_PNG], len(_PNG)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        if data[at + 4 : at + 8] not in _TEXTS:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _lies_on_its_side(image: Image.Image) -> bool:
    """Whether a viewer turns it by 90 degrees. Only what the header says: getexif() of a PNG would decode its pixels."""
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
    """The name without folders and what cannot be printed, not too long, its suffix kept."""
    name = re.split(r"[/\\]", name)[-1]
    name = "".join(letter for letter in name if letter.isprintable()).strip().lstrip(".")
    stem, dot, suffix = name.rpartition(".")
    return (
        name
        if len(name) <= _LONGEST_NAME
        else f"{(stem or suffix)[:_LONGEST_NAME]}{dot if stem else ''}{suffix[:8] if stem else ''}"
    )

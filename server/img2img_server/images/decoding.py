"""Image files -> pixels: whatever Pillow reads, upright, in sRGB and within limits."""

import ctypes
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from PIL import Image, UnidentifiedImageError, _imaging

from img2img_server.errors import InvalidField
from img2img_server.images.color import to_srgb
from img2img_server.images.essentials import Essentials, essentials
from img2img_server.images.orientation import lies_on_its_side, read_orientation, turn_upright
from img2img_server.images.sizes import ImageLimits

READ_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_MEDIA_TYPE = {name: f"image/{name.lower()}" for name in READ_FORMATS}
_MEDIA_TYPE["DIB"], _MEDIA_TYPE["MPO"] = _MEDIA_TYPE["BMP"], _MEDIA_TYPE["JPEG"]

# Pillow warns at one size and fails at twice that. decode() looks at the header and refuses on its own terms, before pixels.
Image.MAX_IMAGE_PIXELS = None


def _silence_decoders() -> None:
    """Keeps what a client sends from writing to standard error. The caller's error says what is wrong."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # libtiff writes from C. Its functions are found through Pillow's extension, which is linked with it; a build that hides
    # them cannot be silenced.
    library = ctypes.CDLL(_imaging.__file__)
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        with suppress(AttributeError):
            set_handler = getattr(library, name)
            set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            set_handler(None)


_silence_decoders()


def decode(data: bytes, limits: ImageLimits, field: str) -> Image.Image:
    """Decodes an image file to RGB of shape (height, width, 3) at its own size: upright by its EXIF's orientation, in sRGB by its
    ICC profile. An animation gives its first frame; transparency becomes white. No other metadata is read.

    Raises InvalidField, naming `field`, for a file that is empty, too large, of no known format or damaged.
    """
    with _reading(field):
        image, file = _open(data, limits, field)
        image.load()
        return turn_upright(to_srgb(image, file.profile), read_orientation(file.exif))


def check_header(data: bytes, limits: ImageLimits, field: str) -> str:
    """The media type of an image file, such as "image/png", by its header alone.

    Raises InvalidField, naming `field`, for a file that is empty, too large, of no known format or of too many pixels.
    """
    with _reading(field):
        image, _ = _open(data, limits, field)
        assert image.format is not None, "what is opened has a format"
        return _MEDIA_TYPE[image.format]


def header_size(data: bytes, limits: ImageLimits, field: str) -> tuple[int, int]:
    """Width and height that decode() would give, by the file's header alone.

    Raises InvalidField as decode does, but for a file that is damaged behind its header.
    """
    with _reading(field):
        image, file = _open(data, limits, field)
        return image.size[::-1] if lies_on_its_side(read_orientation(file.exif)) else image.size


def media_type(head: bytes) -> str | None:
    """The media type by the first bytes of a file, 32 are enough; None if it is of none of READ_FORMATS."""
    Image.init()
    for name in READ_FORMATS:
        accepts = Image.OPEN[name][1]
        if accepts is not None and accepts(head) is True:
            return _MEDIA_TYPE[name]
    return None


def _open(data: bytes, limits: ImageLimits, field: str) -> tuple[Image.Image, Essentials]:
    if not data:
        raise InvalidField(field, "the picture is empty")
    if len(data) > limits.max_bytes:
        raise InvalidField(field, f"the file has {len(data)} bytes, the most is {limits.max_bytes}")
    file = essentials(data)
    image = Image.open(io.BytesIO(file.data), formats=READ_FORMATS)
    if image.width * image.height > limits.max_source_pixels:
        raise InvalidField(
            field,
            f"the picture has {image.width} x {image.height} pixels, the most is {limits.max_source_pixels}: send a smaller one",
        )
    return image, file


@contextmanager
def _reading(field: str) -> Iterator[None]:
    """Within the block, what Pillow raises is InvalidField."""
    try:
        yield
    except (InvalidField, MemoryError):
        raise
    except UnidentifiedImageError:
        raise InvalidField(field, f"not a picture in a known format ({', '.join(READ_FORMATS)})") from None
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise anything on a damaged file, also AssertionError
        raise InvalidField(field, f"the picture cannot be decoded: {error}") from None

"""Encodes Pillow images losslessly. The server converts their colors, like those of image files."""

import io

from PIL import Image

_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})
_TIFF_MODES = frozenset({"I", "F", "CMYK", "LAB", "I;16B"})
_EQUAL_MODE = {
    **{"La": "LA", "RGBa": "RGBA", "PA": "RGBA", "RGBX": "RGB", "YCbCr": "RGB", "HSV": "RGB"},
    **{"I;16L": "I;16", "I;16N": "I;16"},
}
"""Modes that neither format supports, and the modes that preserve their colors."""
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def encode(image: Image.Image) -> bytes:
    """An image as a PNG or TIFF file, with its EXIF orientation applied and its color profile.

    Raises ValueError for an unsupported mode.
    """
    image = _upright(image)
    profile = image.info.get("icc_profile") or None
    mode = _EQUAL_MODE.get(image.mode, image.mode)
    if mode not in _PNG_MODES | _TIFF_MODES:
        raise ValueError(
            f"an image of mode {image.mode!r} is not supported: convert it first, for example with image.convert('RGB')"
        )
    if mode != image.mode:
        image = image.convert(mode)
    file = io.BytesIO()
    if mode in _TIFF_MODES:
        bare = image.copy()  # without the tags of the source TIFF
        bare.info.clear()
        bare.save(file, "TIFF", compression="raw", icc_profile=profile)
    else:
        image.save(
            file, "PNG", compress_level=1, icc_profile=profile, exif=b""
        )  # Higher levels of zlib are slower than the network.
    return file.getvalue()


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # Pillow applies the orientation of a TIFF when it reads the pixels.
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - Pillow raises anything for malformed EXIF
        return image
    return image if turn is None else image.transpose(turn)

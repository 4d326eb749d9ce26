"""The orientation in an image file's EXIF: the one thing there that changes how the image looks."""

import struct

from PIL import Image

UPRIGHT = 1
_TAG = 0x0112
_CODE_OF_TYPE = {1: "B", 3: "H", 4: "L", 16: "Q"}  # BYTE, SHORT, LONG, LONG8; the standard has SHORT
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_orientation(tiff: bytes) -> int:
    """The orientation, 1 to 8, in the first directory of a TIFF structure, which is what EXIF is as well.

    1, upright, if there is none or it cannot be read. Whatever else the structure holds is not looked at.
    """
    try:
        order, big, start = read_tiff_header(tiff)
        for tag, entry in read_directory(tiff, order, big, start):
            if tag == _TAG:
                code = _CODE_OF_TYPE[struct.unpack_from(f"{order}H", entry, 2)[0]]
                (value,) = struct.unpack_from(order + code, entry, 12 if big else 8)
                return value if value in _TURNS else UPRIGHT
    except (struct.error, KeyError, ValueError):
        pass
    return UPRIGHT


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """Turns and flips an image that is stored in this orientation."""
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def lies_on_its_side(orientation: int) -> bool:
    """Whether the upright image is as wide as the stored one is high."""
    return orientation >= 5


def read_tiff_header(tiff: bytes) -> tuple[str, bool, int]:
    """The byte order as struct spells it, whether it is a BigTIFF, and where the first directory starts. ValueError for another
    file, struct.error for one that is cut off."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or not {42, 43} & set(tiff[2:4]):
        raise ValueError("not a TIFF structure")
    big = 43 in tiff[2:4]
    return order, big, struct.unpack_from(f"{order}Q" if big else f"{order}L", tiff, 8 if big else 4)[0]


def read_directory(tiff: bytes, order: str, big: bool, start: int) -> list[tuple[int, bytes]]:
    """The entries of a directory, each by its tag, as far as they are there. struct.error if nothing of it is."""
    (count,) = struct.unpack_from(f"{order}Q" if big else f"{order}H", tiff, start)
    start, size = start + (8 if big else 2), 20 if big else 12
    count = min(count, (len(tiff) - start) // size)
    entries = (tiff[at : at + size] for at in range(start, start + count * size, size))
    return [(struct.unpack_from(f"{order}H", entry)[0], entry) for entry in entries]

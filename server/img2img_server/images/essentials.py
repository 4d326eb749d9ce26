"""Removes metadata from an image file before Pillow reads it; extracts EXIF (for its orientation) and the colour profile.

Metadata must not prevent decoding: Pillow refuses a PNG with large comments and fails on malformed EXIF, and parsing metadata
costs memory.
"""

import struct
import zlib
from dataclasses import dataclass

from PIL import Image

UPRIGHT = 1
_TAG = 0x0112
_CODE_OF_TYPE = {1: "B", 3: "H", 4: "L", 16: "Q"}  # BYTE, SHORT, LONG, LONG8; the standard specifies SHORT
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
    """The orientation, 1 to 8, in the first directory of a TIFF structure; EXIF is one.

    Returns 1, upright, if there is none or it cannot be read. Other contents are ignored.
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
    """Rotates or flips an image that is stored in this orientation."""
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def lies_on_its_side(orientation: int) -> bool:
    """Whether the upright image has the stored image's width and height swapped."""
    return orientation >= 5


def read_tiff_header(tiff: bytes) -> tuple[str, bool, int]:
    """The byte order in struct's notation, whether it is a BigTIFF, and the offset of the first directory, within the file.

    Raises ValueError for another format, struct.error for a truncated file.
    """
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or not {42, 43} & set(tiff[2:4]):
        raise ValueError("not a TIFF structure")
    big = 43 in tiff[2:4]
    (start,) = struct.unpack_from(f"{order}Q" if big else f"{order}L", tiff, 8 if big else 4)
    if start > len(tiff):  # struct does not accept offsets of 64 bits
        raise struct.error(f"the first directory starts at byte {start} of {len(tiff)}")
    return order, big, start


def read_directory(tiff: bytes, order: str, big: bool, start: int) -> list[tuple[int, bytes]]:
    """The tags and entries of a directory, as far as the file contains them. Raises struct.error if it contains none."""
    (count,) = struct.unpack_from(f"{order}Q" if big else f"{order}H", tiff, start)
    start, size = start + (8 if big else 2), 20 if big else 12
    count = min(count, (len(tiff) - start) // size)
    entries = (tiff[at : at + size] for at in range(start, start + count * size, size))
    return [(struct.unpack_from(f"{order}H", entry)[0], entry) for entry in entries]


MAX_PROFILE_BYTES = 8 * 2**20
"""Larger colour profiles are ignored. Printer profiles have 0.5 to 3 MB."""

_MAX_RAW_EXIF = 2**20
_RAW_EXIF = (b"Raw profile type exif\0", b"Raw profile type APP1\0")
_EXIF, _ICC = b"Exif\0\0", b"ICC_PROFILE\0"
_PNG = b"\x89PNG\r\n\x1a\n"
_START_OF_SCAN = 0xDA
_BARE_MARKERS = {0x01, *range(0xD0, 0xDA)}  # without a length
_TIFF_PROFILE = 34675
# Tags that decoding a TIFF's pixels needs, by TIFF 6.0 and libtiff: sizes, strips and tiles, compression, samples, colours.
_TIFF_PIXELS = {
    *(254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 334, 338, 339),
    *(347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532),
}


@dataclass(frozen=True, slots=True)
class Essentials:
    """An image file without metadata. `exif` is a TIFF structure, `profile` an ICC profile; both are unchecked, and empty if the
    file has none."""

    data: bytes
    exif: bytes = b""
    profile: bytes = b""


def essentials(data: bytes) -> Essentials:
    """Separates a file from its metadata. From the first structural damage on, the file is left unchanged for the decoder."""
    if data.startswith(_PNG):
        return _png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    if data[:2] in (b"II", b"MM"):
        return _tiff(data)
    return Essentials(data, profile=_bmp_profile(data) if data[:2] == b"BM" else b"")


def _png(data: bytes) -> Essentials:
    """Keeps the critical chunks and tRNS; of an animation, the image in IDAT."""
    view, kept, exif, profile = memoryview(data), [memoryview(_PNG)], b"", b""
    at = len(_PNG)
    while at < len(data):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4])
        if not kind.isalpha():
            kept.append(view[at:])
            break
        if kind[:1].isupper() or kind == b"tRNS":
            kept.append(view[at:end])
        elif kind == b"eXIf":
            exif = exif or data[at + 8 : end - 4]
        elif kind == b"iCCP":
            profile = profile or _inflated(data[at + 8 : end - 4], MAX_PROFILE_BYTES)
        elif kind in (b"tEXt", b"zTXt") and data.startswith(_RAW_EXIF, at + 8):
            exif = exif or _raw_exif(kind, data[at + 8 : end - 4])
        at = end
    return Essentials(b"".join(kept), _without_prefix(exif), profile)


def _raw_exif(kind: bytes, body: bytes) -> bytes:
    """EXIF in a PNG's text as ImageMagick writes it: three header lines, then hexadecimal digits."""
    text = _inflated(body, _MAX_RAW_EXIF) if kind == b"zTXt" else body.partition(b"\0")[2]
    try:
        return bytes.fromhex("".join(text[: 2 * _MAX_RAW_EXIF].decode("latin-1").split("\n")[3:]))
    except ValueError:
        return b""


def _inflated(body: bytes, most: int) -> bytes:
    """The decompressed data after a chunk's keyword; empty if it is damaged or has more than `most` bytes."""
    inflate = zlib.decompressobj()
    try:
        found = inflate.decompress(body.partition(b"\0")[2][1:], most)
    except zlib.error:
        return b""
    return b"" if inflate.unconsumed_tail else found


def _without_prefix(exif: bytes) -> bytes:
    """EXIF without JPEG's prefix, which some writers add even twice."""
    while exif.startswith(_EXIF):
        exif = exif[len(_EXIF) :]
    return exif


def _jpeg(data: bytes) -> Essentials:
    """Drops comments and all application segments except JFIF's and Adobe's, which define the colours. An MPO becomes a JPEG."""
    view, kept, exif, profile = memoryview(data), [memoryview(data)[:2]], [], []
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != _START_OF_SCAN:
        marker = data[at + 1]
        if marker == 0xFF or marker in _BARE_MARKERS:
            end = at + (1 if marker == 0xFF else 2)
        else:
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        body = data[at + 4 : end]
        if marker == 0xE1 and body.startswith(_EXIF):
            exif.append(body[len(_EXIF) :])
        elif marker == 0xE2 and body.startswith(_ICC):
            profile.append(body[len(_ICC) :])
        elif (not 0xE1 <= marker <= 0xEF and marker != 0xFE) or marker == 0xEE:
            kept.append(view[at:end])
        at = end
    kept.append(view[at:])
    return Essentials(b"".join(kept), _without_prefix(b"".join(exif)), _joined(profile))


def _joined(parts: list[bytes]) -> bytes:
    """Joins the parts of a profile, each preceded by its number and the count of parts; empty if one is missing."""
    numbered = {part[0]: part[2:] for part in parts if len(part) > 2 and part[1] == len(parts)}
    return b"".join(numbered[number] for number in sorted(numbered)) if len(numbered) == len(parts) else b""


def _webp(data: bytes) -> Essentials:
    """Drops nothing, because the decoder skips metadata."""
    found = {b"EXIF": b"", b"ICCP": b""}
    at = 12
    while at + 8 <= len(data):
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if kind in found:
            found[kind] = found[kind] or data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
    return Essentials(data, _without_prefix(found[b"EXIF"]), found[b"ICCP"])


def _tiff(data: bytes) -> Essentials:
    """Appends a directory with only the tags that decoding needs, and makes it the only one. Its data stays in place."""
    try:
        order, big, start = read_tiff_header(data)
        found = dict(reversed(read_directory(data, order, big, start)))  # The first entry of a tag counts.
    except (ValueError, struct.error):
        return Essentials(data)
    kept = [entry for tag, entry in sorted(found.items()) if tag in _TIFF_PIXELS]
    number = "Q" if big else "L"
    padding = b"\0" * (len(data) % 2)
    directory = struct.pack(f"{order}Q" if big else f"{order}H", len(kept)) + b"".join(kept) + struct.pack(order + number, 0)
    head = data[: 8 if big else 4] + struct.pack(order + number, len(data) + len(padding))
    slim = b"".join((head, memoryview(data)[len(head) :], padding, directory))
    return Essentials(slim, data, _tiff_value(data, order, big, found.get(_TIFF_PROFILE, b"")))


def _tiff_value(data: bytes, order: str, big: bool, entry: bytes) -> bytes:
    """The bytes that a directory entry refers to."""
    if not entry:
        return b""
    number = "Q" if big else "L"
    length, at = struct.unpack_from(f"{order}{number}{number}", entry, 4)
    return data[at : at + length]


def _bmp_profile(data: bytes) -> bytes:
    """The profile embedded by a version 5 header, empty if there is none."""
    if len(data) < 138 or int.from_bytes(data[14:18], "little") < 124 or data[70:74] != b"DEBM":
        return b""
    at, length = struct.unpack_from("<LL", data, 126)
    return data[14 + at : 14 + at + length]

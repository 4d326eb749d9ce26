"""Cuts an image file down to what its pixels need, before Pillow sees it.

Metadata must not decide whether an image is read: Pillow refuses a PNG for the size of its comments and fails on malformed EXIF,
and what it parses costs memory. Two things of it matter, and are taken out here: the EXIF, for its orientation, and the colour
profile.
"""

import struct
import zlib
from dataclasses import dataclass

from img2img_server.images.orientation import read_directory, read_tiff_header

MAX_PROFILE_BYTES = 8 * 2**20
"""A larger colour profile is ignored; printers' have 0.5 to 3 MB."""

_MAX_RAW_EXIF = 2**20
_RAW_EXIF = (b"Raw profile type exif\0", b"Raw profile type APP1\0")
_EXIF, _ICC = b"Exif\0\0", b"ICC_PROFILE\0"
_PNG = b"\x89PNG\r\n\x1a\n"
_START_OF_SCAN = 0xDA
_BARE_MARKERS = {0x01, *range(0xD0, 0xDA)}  # without a length
_TIFF_PROFILE = 34675
# What a TIFF's pixels need, by TIFF 6.0 and libtiff: sizes, strips and tiles, compression, samples, colours.
_TIFF_PIXELS = {
    *(254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 334, 338, 339),
    *(347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532),
}


@dataclass(frozen=True, slots=True)
class Essentials:
    """An image file of nothing but pixels. `exif` is a TIFF structure, `profile` an ICC profile; empty if there is none, and
    neither is checked."""

    data: bytes
    exif: bytes = b""
    profile: bytes = b""


def essentials(data: bytes) -> Essentials:
    """The file without its metadata. One whose structure is damaged stays as it is from there on, for the decoder to judge."""
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
    """Keeps the critical chunks and tRNS: of an animation, the image that IDAT holds."""
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
    """EXIF as ImageMagick writes it into a PNG's text: after three lines of what it is, in hexadecimal."""
    text = _inflated(body, _MAX_RAW_EXIF) if kind == b"zTXt" else body.partition(b"\0")[2]
    try:
        return bytes.fromhex("".join(text[: 2 * _MAX_RAW_EXIF].decode("latin-1").split("\n")[3:]))
    except ValueError:
        return b""


def _inflated(body: bytes, most: int) -> bytes:
    """What is compressed behind a chunk's keyword; empty if it is damaged or has more than so many bytes."""
    inflate = zlib.decompressobj()
    try:
        found = inflate.decompress(body.partition(b"\0")[2][1:], most)
    except zlib.error:
        return b""
    return b"" if inflate.unconsumed_tail else found


def _without_prefix(exif: bytes) -> bytes:
    """EXIF from its TIFF header on. Some writers put JPEG's prefix before it, even twice."""
    while exif.startswith(_EXIF):
        exif = exif[len(_EXIF) :]
    return exif


def _jpeg(data: bytes) -> Essentials:
    """Drops comments and every application segment but JFIF's and Adobe's, which tell the colours. An MPO is a JPEG then."""
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
    """A profile of parts, each with its number and with how many there are before it; empty if one is missing."""
    numbered = {part[0]: part[2:] for part in parts if len(part) > 2 and part[1] == len(parts)}
    return b"".join(numbered[number] for number in sorted(numbered)) if len(numbered) == len(parts) else b""


def _webp(data: bytes) -> Essentials:
    """Nothing is dropped: the decoder passes over what it does not need."""
    found = {b"EXIF": b"", b"ICCP": b""}
    at = 12
    while at + 8 <= len(data):
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if kind in found:
            found[kind] = found[kind] or data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
    return Essentials(data, _without_prefix(found[b"EXIF"]), found[b"ICCP"])


def _tiff(data: bytes) -> Essentials:
    """Puts a directory of what the pixels need at the end and makes it the only one. All that it points at stays in place."""
    try:
        order, big, start = read_tiff_header(data)
        found = dict(reversed(read_directory(data, order, big, start)))  # Of two entries with one tag the first counts.
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
    """The bytes that a directory's entry points at."""
    if not entry:
        return b""
    number = "Q" if big else "L"
    length, at = struct.unpack_from(f"{order}{number}{number}", entry, 4)
    return data[at : at + length]


def _bmp_profile(data: bytes) -> bytes:
    """The profile that a header of version 5 says is embedded."""
    if len(data) < 138 or int.from_bytes(data[14:18], "little") < 124 or data[70:74] != b"DEBM":
        return b""
    at, length = struct.unpack_from("<LL", data, 126)
    return data[14 + at : 14 + at + length]

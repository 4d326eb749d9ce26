"""Checks the structure of an image file before it is decoded: the number of its blocks, scans and directory entries.

Decoders take time and memory for each of them, however small: an empty JPEG scan of 53 bytes costs milliseconds. Real files have
few blocks for their size. The check jumps from block to block and stops at the first exceeded limit.
"""

import re
import struct
from collections.abc import Callable

from img2img_server.errors import InvalidField
from img2img_server.images.essentials import read_tiff_header

MAX_SCANS = 100
"""Maximum scans of a JPEG. Encoders write 1 to 20; libtiff has the same limit."""
MAX_JUNK = 64 * 2**10
"""Maximum bytes between blocks. Pillow reads them one by one."""
MAX_TIFF_ENTRIES = 512
"""Maximum entries of a TIFF's first directory. TIFF 6.0, its extensions and EXIF together define fewer."""
MAX_TIFF_PARTS = 2**16
"""Maximum strips or tiles of a TIFF."""
MAX_RLE_BYTES = 2 * 2**20
"""Maximum bytes of a run-length encoded BMP, which Pillow decodes in Python."""
_SOME_BLOCKS, _BYTES_PER_BLOCK = 1024, 256

_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""Any marker within a scan, except a stuffed 0 and restarts."""
_NOT_FILL = re.compile(rb"[^\xff]")
_START_OF_SCAN, _END_OF_IMAGE, _BARE = 0xDA, 0xD9, {0x01, *range(0xD0, 0xD9)}
_TIFF_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_TIFF_PARTS = {273, 279, 324, 325}
"""Tags with an element per strip or tile."""


class _TooMuch(Exception):
    """The file exceeds a limit, which the text names."""


def check(data: bytes, field: str) -> None:
    """Raises InvalidField, naming `field`, if a file has more blocks, scans or entries than real files of its size.

    Damaged files and unknown formats pass; the decoder reports them.
    """
    look = next((look for start, look in _LOOKS if data.startswith(start)), None)
    if look is None:
        return
    try:
        look(data)
    except _TooMuch as error:
        raise InvalidField(field, f"the image cannot be decoded: {error}") from None
    except (IndexError, ValueError, struct.error):
        return  # truncated, or another format


class _Blocks:
    """Counts a file's blocks, whose limit depends on its size, and the bytes between them."""

    def __init__(self, data: bytes, name: str) -> None:
        self._most = _SOME_BLOCKS + len(data) // _BYTES_PER_BLOCK
        self._name = name
        self._count = self._junk = 0

    def one_more(self) -> None:
        self._count += 1
        if self._count > self._most:
            raise _TooMuch(f"it has more than {self._most} {self._name}, too many for its size")

    def junk(self, size: int) -> None:
        self._junk += size
        if self._junk > MAX_JUNK:
            raise _TooMuch(f"it has more than {MAX_JUNK} bytes between its {self._name}")


def _jpeg(data: bytes) -> None:
    blocks, scans, at = _Blocks(data, "segments"), 0, 2
    while True:
        found = data.find(b"\xff", at) if not scans else _next_marker(data, at)
        if found < 0:
            return
        after = _NOT_FILL.search(data, found)
        if after is None:
            return
        if not scans:
            blocks.junk(after.start() - 1 - at)
        marker, at = data[after.start()], after.end()
        if marker == _END_OF_IMAGE and scans:
            return
        blocks.one_more()
        if marker == _START_OF_SCAN:
            scans += 1
            if scans > MAX_SCANS:
                raise _TooMuch(f"it has more than {MAX_SCANS} scans")
        if marker not in _BARE and marker not in (0, _END_OF_IMAGE):
            at += int.from_bytes(data[at : at + 2])


def _next_marker(data: bytes, at: int) -> int:
    found = _JPEG_MARKER.search(data, at)
    return -1 if found is None else found.start()


def _png(data: bytes) -> None:
    blocks, at = _Blocks(data, "chunks"), 8
    while at + 8 <= len(data):
        blocks.one_more()
        if data[at + 4 : at + 8] == b"IEND":
            return
        at += 12 + int.from_bytes(data[at : at + 4])


def _webp(data: bytes) -> None:
    if data[8:12] != b"WEBP":
        return
    blocks, at, end = _Blocks(data, "chunks"), 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while at + 8 <= end:
        blocks.one_more()
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + length + length % 2


def webp_pixels(data: bytes) -> int:
    """Pixels of a WebP's canvas, whose memory is allocated when the file is opened; 0 for other formats.

    https://developers.google.com/speed/webp/docs/riff_container
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return 0
    kind = data[12:16]
    if kind == b"VP8X":
        return (int.from_bytes(data[24:27], "little") + 1) * (int.from_bytes(data[27:30], "little") + 1)
    if kind == b"VP8L":
        packed = int.from_bytes(data[21:25], "little")
        return ((packed & 0x3FFF) + 1) * ((packed >> 14 & 0x3FFF) + 1)
    width, height = int.from_bytes(data[26:28], "little"), int.from_bytes(data[28:30], "little")
    return (width & 0x3FFF) * (height & 0x3FFF)


def _gif(data: bytes) -> None:
    """Checks the blocks before the first frame; further frames are not read."""
    blocks, at = _Blocks(data, "blocks"), 13 + _color_table(data[10])
    while at < len(data):
        kind, at = data[at], at + 1
        if kind in b",;":
            return
        if kind != 0x21:
            blocks.junk(1)
            continue
        at += 1
        while (length := data[at]) != 0:
            blocks.one_more()
            at += 1 + length
        blocks.one_more()
        at += 1


def _color_table(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _bmp(data: bytes) -> None:
    compression = int.from_bytes(data[30:34], "little") if int.from_bytes(data[14:18], "little") >= 40 else 0
    if compression in (1, 2) and len(data) > MAX_RLE_BYTES:
        raise _TooMuch(f"it is run-length encoded and has {len(data)} bytes, the maximum is {MAX_RLE_BYTES}")


def _tiff(data: bytes) -> None:
    """Checks the first directory; further ones are not read. Its values may overlap, but not exceed the file's size by much."""
    order, big, start = read_tiff_header(data)
    (count,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, start)
    if count > MAX_TIFF_ENTRIES:
        raise _TooMuch(f"its directory has {count} entries, the maximum is {MAX_TIFF_ENTRIES}")
    entry, total = struct.Struct(f"{order}HH{'Q8x' if big else 'L4x'}"), 0
    start += 8 if big else 2
    whole = max(0, min(count, (len(data) - start) // entry.size))
    for tag, kind, length in entry.iter_unpack(data[start : start + whole * entry.size]):
        if tag in _TIFF_PARTS and length > MAX_TIFF_PARTS:
            raise _TooMuch(f"it has {length} strips or tiles, the maximum is {MAX_TIFF_PARTS}")
        total += length * _TIFF_TYPE_BYTES.get(kind, 1)
    if total > len(data) + MAX_JUNK:
        raise _TooMuch(f"its directory refers to {total} bytes, but the file has {len(data)}")


_LOOKS: tuple[tuple[bytes, Callable[[bytes], None]], ...] = (
    (b"\xff\xd8\xff", _jpeg),
    (b"\x89PNG\r\n\x1a\n", _png),
    (b"RIFF", _webp),
    (b"GIF8", _gif),
    (b"BM", _bmp),
    (b"II", _tiff),
    (b"MM", _tiff),
)

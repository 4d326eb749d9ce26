"""Image files that cost a decoder far more than their size suggests."""

import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image

LARGEST = 16 * 2**20


def saved(size: tuple[int, int], file_format: str, mode: str = "RGB", **options: object) -> bytes:
    """The file of an image of one color."""
    file = io.BytesIO()
    Image.new(mode, size, 128 if mode in ("L", "P") else "teal").save(file, file_format, **options)
    return file.getvalue()


def jpeg_scans(count: int, size: tuple[int, int] = (4000, 4000)) -> bytes:
    """A progressive JPEG with `count` scans that change nothing."""
    data = saved(size, "JPEG", "L", progressive=True)
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00" + b"\x7f" * 4  # AC of component 1: runs of empty blocks
    table = b"\xff\xc4\x00\x14\x10" + bytes([1] + [0] * 15) + b"\xe0"  # one code: at least 2^14 empty blocks
    return data[:-2] + (table + scan) * count + b"\xff\xd9"


def jpeg_segments(marker: int, count: int, body: bytes = b"") -> bytes:
    """A JPEG with `count` segments before its image."""
    data = saved((8, 8), "JPEG")
    return data[:2] + (bytes([0xFF, marker]) + struct.pack(">H", 2 + len(body)) + body) * count + data[2:]


def jpeg_segments_within(marker: int, count: int) -> bytes:
    """A JPEG with `count` segments after its first scan."""
    return saved((8, 8), "JPEG")[:-2] + bytes([0xFF, marker, 0, 2]) * count + b"\xff\xd9"


def jpeg_junk(byte: bytes, count: int) -> bytes:
    """A JPEG with `count` junk or fill bytes before its image."""
    data = saved((8, 8), "JPEG")
    return data[:20] + byte * count + data[20:]


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks: bytes, size: tuple[int, int] = (8, 8), color: int = 2, idat: bytes | None = None, depth: int = 8) -> bytes:
    """A PNG with further chunks before its image."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, color, 0, 0, 0))
    rows = zlib.compress(bytes((3 * size[0] + 1) * size[1])) if idat is None else idat
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND")


def png_chunks(kind: bytes, count: int, body: bytes = b"") -> bytes:
    """A PNG with `count` chunks of one kind before its image."""
    return png(chunk(kind, body) * count)


def png_split(count: int) -> bytes:
    """A PNG whose image is followed by `count` empty IDAT chunks."""
    data = png()
    at = data.index(b"IEND") - 4
    return data[:at] + chunk(b"IDAT") * count + data[at:]


def gif(*extensions: bytes, size: tuple[int, int] = (8, 8)) -> bytes:
    """A GIF with extensions before its image."""
    data = saved(size, "GIF", "P")
    at = 13 + 3 * 2 ** ((data[10] & 7) + 1) if data[10] & 0x80 else 13
    return data[:at] + b"".join(extensions) + data[at:]


def gif_comments(count: int, block: bytes = b"\x01a", each: int = 1) -> bytes:
    """A GIF with `count` comments of `each` sub-blocks."""
    return gif((b"\x21\xfe" + block * each + b"\0") * count)


def webp_chunks(count: int) -> bytes:
    """A WebP with `count` empty chunks of an unknown type."""
    image = saved((8, 8), "WEBP", lossless=True)[12:]
    body = b"WEBP" + b"VP8X" + struct.pack("<IIHBHB", 10, 0, 7, 0, 7, 0) + b"ABCD\0\0\0\0" * count + image
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_frames(count: int) -> bytes:
    """An animated WebP of `count` frames."""
    image = saved((8, 8), "WEBP", lossless=True)[12:]
    frame = struct.pack("<3B3B3B3B3BB", *bytes(6), 7, 0, 0, 7, 0, 0, 1, 0, 0, 0) + image
    frames = (b"ANMF" + struct.pack("<I", len(frame)) + frame) * count
    head = b"VP8X" + struct.pack("<IIHBHB", 10, 2, 7, 0, 7, 0) + b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    body = b"WEBP" + head + frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(*entries: tuple[int, int, int, int], size: tuple[int, int] = (8, 8), tail: bytes = b"", parts: int = 1) -> bytes:
    """An uncompressed gray TIFF with more entries (tag, type, count, value or offset) in its directory."""
    own = [
        (256, 4, 1, size[0]), (257, 4, 1, size[1]), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
        (277, 3, 1, 1), (278, 4, 1, size[1]), (279, 4, 1, size[0] * size[1]),
    ]  # fmt: skip
    known = {entry[0]: entry for entry in own} | {entry[0]: entry for entry in entries}
    directory = struct.pack("<H", len(known)) + b"".join(struct.pack("<HHII", *known[tag]) for tag in sorted(known)) + bytes(4)
    pixels = bytes(size[0] * size[1])
    return b"II*\0" + struct.pack("<I", 8 + len(pixels) + len(tail)) + pixels + tail + directory


def tiff_entries(count: int, size: int = LARGEST // 2) -> bytes:
    """A TIFF whose directory has so many entries, each of which is the same `size` bytes."""
    return tiff(*((tag, 7, size, 8) for tag in range(40000, 40000 + count)), tail=bytes(size))


def tiff_strips(count: int) -> bytes:
    """A TIFF with `count` strips that all have the same data."""
    tail = struct.pack("<I", 8) * count + struct.pack("<I", 8) * count
    first = 8 + 64
    return tiff((273, 4, count, first), (279, 4, count, first + 4 * count), (278, 4, 1, 1), tail=tail)


def bmp_run_lengths(count: int, size: tuple[int, int] = (4000, 4000)) -> bytes:
    """A run-length encoded BMP with `count` deltas of (0, 0)."""
    body = b"\0\2\0\0" * count + b"\0\1"
    head = struct.pack("<IiiHHIIiiII", 40, *size, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 14 + 40 + 1024 + len(body), 0, 0, 14 + 40 + 1024) + head + bytes(1024) + body


BOMBS: dict[str, Callable[[], bytes]] = {
    "JPEG scans": lambda: jpeg_scans(20_000),
    "JPEG application segments": lambda: jpeg_segments(0xE9, LARGEST // 4 - 10_000),
    "JPEG comments": lambda: jpeg_segments(0xFE, LARGEST // 4 - 10_000),
    "JPEG profiles": lambda: jpeg_segments(0xE2, LARGEST // 18 - 10_000, b"ICC_PROFILE\0\1\1"),
    "JPEG restarts before the image": lambda: jpeg_junk(b"\xff\xd0", LARGEST // 2 - 10_000),
    "JPEG segments behind a scan": lambda: jpeg_segments_within(0xE9, LARGEST // 4 - 10_000),
    "JPEG junk": lambda: jpeg_junk(b"a", LARGEST - 10_000),
    "JPEG fill": lambda: jpeg_junk(b"\xff", LARGEST - 10_000),
    "JPEG stuffing": lambda: jpeg_junk(b"\xff\0", LARGEST // 2 - 10_000),
    "PNG text": lambda: png_chunks(b"tEXt", LARGEST // 12 - 1000),
    "PNG unknown chunks": lambda: png_chunks(b"abCd", LARGEST // 12 - 1000),
    "PNG empty IDATs": lambda: png_split(LARGEST // 12 - 1000),
    "PNG frames": lambda: png_chunks(b"fcTL", LARGEST // 38 - 1000, bytes(26)),
    "GIF comments": lambda: gif_comments(LARGEST // 5 - 1000),
    "GIF comment of small blocks": lambda: gif_comments(1, each=LARGEST // 2 - 1000),
    "GIF extensions": lambda: gif(b"\x21\xf9\x04\0\0\0\0\0" * (LARGEST // 8 - 1000)),
    "GIF junk": lambda: gif(b"a" * (LARGEST - 10_000)),
    "WebP chunks": lambda: webp_chunks(LARGEST // 8 - 1000),
    "WebP frames": lambda: webp_frames(100_000),
    "TIFF entries": lambda: tiff_entries(20_000),
    "TIFF entries that overlap": lambda: tiff_entries(400),
    "TIFF strips": lambda: tiff_strips(LARGEST // 8 - 1000),
    "BMP run lengths": lambda: bmp_run_lengths(LARGEST // 4 - 10_000),
}
"""Each is smaller than LARGEST bytes and is refused by one of the bounds."""

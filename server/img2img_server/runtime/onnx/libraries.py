"""What a shared library needs, read from its file: it is not loaded, so nothing of it runs."""

import itertools
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

_LOAD, _DYNAMIC = 1, 2
"""Types of a segment."""
_END, _NEEDED, _STRINGS = 0, 1, 5
"""Tags of the dynamic segment's entries."""


class _Segment(NamedTuple):
    """A part of the file, in bytes from its start, and its address in memory."""

    kind: int
    offset: int
    address: int
    length: int


def needed_libraries(path: Path) -> list[str]:
    """The names of the libraries that the 64-bit ELF file `path` is linked with, such as "libcublas.so.13", in its order.

    Raises OSError where it cannot be read, ValueError where it is no such file. The format: `man 5 elf`.
    """
    with path.open("rb") as file:
        try:
            segments = _segments(file)
            dynamic = next(item for item in segments if item.kind == _DYNAMIC)
            data = _read(file, dynamic.offset, dynamic.length)
            entries = list(itertools.takewhile(lambda entry: entry[0] != _END, struct.iter_unpack("<QQ", data)))
            address = next(value for tag, value in entries if tag == _STRINGS)
            loaded = next(item for item in segments if item.kind == _LOAD and 0 <= address - item.address < item.length)
        except (struct.error, StopIteration, ValueError, OverflowError) as error:
            raise ValueError(f"{path.name} is no shared library, or not all of one") from error
        strings = loaded.offset + address - loaded.address
        names = (_read(file, strings + value, 256) for tag, value in entries if tag == _NEEDED)
        return [name.partition(b"\0")[0].decode() for name in names]


def _segments(file: BinaryIO) -> list[_Segment]:
    head = file.read(64)
    if head[:6] != b"\x7fELF\x02\x01":
        raise struct.error("no ELF file of 64 bits, little-endian")
    (start,), (size, count) = struct.unpack_from("<Q", head, 32), struct.unpack_from("<HH", head, 54)
    headers = [_read(file, start + index * size, size) for index in range(count)]
    return [_Segment(*struct.unpack_from("<I4xQQ8xQ", header)) for header in headers]


def _read(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)

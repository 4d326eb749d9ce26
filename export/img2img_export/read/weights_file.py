"""Reads the header of a safetensors file, and identifies files that are not safetensors.

Such files are unfinished downloads, git-lfs pointers, pickles or login pages. Standard library only.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from img2img_server.bundle.files import MOST_TENSORS, read_safetensors_header

from img2img_export.errors import ExportError, first_line
from img2img_export.read.texts import parse_json

SAFETENSORS = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
PICKLE_REASON = (
    "pickles can run code when read, so they are never opened; if you trust it, convert it to safetensors "
    '("Pickled checkpoints" in docs/export.md has the command), or download the .safetensors file of the same model'
)

_MOST_VALUES = 20 * MOST_TENSORS
"""Maximum number of values in a header."""
_MOST_SIZES = 64
"""Maximum number of axes in a shape."""
_BITS = {"BOOL": 8}
_WIDTH = re.compile(r"(?:BF|F|I|U|C)(\d+)(?:_E\d+M\d+(?:FN|FNUZ)?)?$")
"""Names of safetensors types contain their number of bits: F16, F8_E4M3, U8, C64."""
_LFS = b"version https://git-lfs"
_HEADS = (
    (
        _LFS,
        "is a git-lfs pointer, not the file itself: run `git lfs install && git lfs pull` in its repository, or download the "
        "file from its page",
    ),
    (b"GGUF", "is a GGUF file, whose weights are quantized: choose the original safetensors model"),
    (b"PK\x03\x04", f"is a pickle or an archive, despite its name: {PICKLE_REASON}"),
    (b"\x80", f"is a pickle, despite its name: {PICKLE_REASON}"),
    (b"<", "is a web page, not weights: the download was refused or requires a login; download it again"),
    (b"\x89HDF", "is a Keras HDF5 file: choose the safetensors model in diffusers' layout"),
)
"""First bytes of files that are commonly mistaken for safetensors."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a safetensors header: its type, such as F16, and shape."""

    dtype: str
    shape: tuple[int, ...]


def is_safetensors(name: str) -> bool:
    """Whether a file has the suffix .safetensors, in any case."""
    return name.lower().endswith(SAFETENSORS)


def is_pickle(name: str) -> bool:
    """Whether a file has a suffix used for pickled weights, in any case."""
    return name.lower().endswith(PICKLE_SUFFIXES)


def require_safetensors(path: Path) -> None:
    """Raises ExportError unless `path` is a safetensors file by its name and its header."""
    if is_pickle(path.name):
        raise ExportError(f"{path} is a pickle: {PICKLE_REASON}")
    if not path.is_file():
        raise ExportError(f"{path} is not a file")
    if not is_safetensors(path.name):
        found = _other_format(path)
        raise ExportError(f"{path} {found}" if found else f"{path} is not a .safetensors file")
    read_header(path)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and metadata in a safetensors header. Raises ExportError if the file is damaged or not safetensors."""
    size = path.stat().st_size
    if size == 0:
        raise ExportError(f"{path} is damaged: it is empty; download or copy it again")
    if found := _other_format(path):
        raise ExportError(f"{path} {found}")
    try:
        header, length = read_safetensors_header(path)
        if 8 + length > size:
            raise ExportError(_truncated(path, size, 8 + length))
        data = parse_json(header, _MOST_VALUES)
        notes = data.pop("__metadata__", {})
        named = 8 + length + max((item["data_offsets"][1] for item in data.values()), default=0)
        tensors = {name: TensorInfo(item["dtype"], tuple(item["shape"])) for name, item in data.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ExportError(f"{path} is damaged or not a safetensors file: {first_line(error)}") from None
    if named > size:
        raise ExportError(_truncated(path, size, named))
    if named != size:
        raise ExportError(f"{path} is damaged: it has {size - named} bytes more than its header says; download or copy it again")
    _check_header(path, data, notes)
    return tensors, notes


def _check_header(path: Path, tensors: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    """Raises ExportError unless the tensors are contiguous and each has the length of its type and shape."""
    end = 0
    try:
        for name, item in sorted(tensors.items(), key=lambda pair: pair[1]["data_offsets"]):
            end = _check(name, item, end)
        if not all(isinstance(note, str) for note in notes.values()):
            raise ValueError("its metadata values are not all strings")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ExportError(f"{path} is damaged: {first_line(error)}; download or copy it again") from None


def _check(name: str, item: Mapping[str, Any], start: int) -> int:
    """The end offset of a tensor that begins at `start`.

    Raises ValueError if there is a gap or an overlap, or if the length does not match type and shape; LookupError, TypeError or
    AttributeError if the item is malformed.
    """
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if len(shape) > _MOST_SIZES or not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, *offsets)):
        raise ValueError(f"the shape and the offsets of {name[:80]} must be integers of at least 0")
    bits = _BITS.get(dtype) or (int(width[1]) if isinstance(dtype, str) and (width := _WIDTH.match(dtype)) else 0)
    if bits == 0:
        raise ValueError(f"{name[:80]} has an unknown type {str(dtype)[:80]!r}")
    if offsets[0] != start or 8 * (offsets[1] - offsets[0]) != bits * math.prod(shape):
        raise ValueError(f"the offsets of {name[:80]} do not agree with its type and shape, or with the tensor before it")
    return int(offsets[1])


def refuse_pointer(path: Path) -> None:
    """Raises ExportError if the file is a git-lfs pointer, which any file of a repository may be."""
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ExportError(f"{path} {_HEADS[0][1]}")


def _truncated(path: Path, size: int, wanted: int) -> str:
    return f"{path} is damaged: it is truncated, with {size} of at least {wanted} bytes; download or copy it again"


def _other_format(path: Path) -> str | None:
    """The kind of a file that cannot be safetensors by its first bytes, or None."""
    with path.open("rb") as file:
        head = file.read(64)
    # The file begins with the header's length, whose upper bytes are zero, so a small length never looks like these.
    if len(head) >= 8 and head[4:8] == b"\0\0\0\0":
        return None
    text = head.lstrip()
    return next((what for start, what in _HEADS if text.startswith(start)), None)

"""Reads texts with a byte order mark, in UTF-8 or UTF-16, as written by editors on Windows."""

import codecs
from pathlib import Path
from typing import Any

from img2img_server.bundle import files
from img2img_server.bundle.files import parse_json as parse_json
from img2img_server.bundle.tokenizer_files import is_table

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def read_json(path: Path) -> Any:
    """The contents of a JSON file (a configuration or a tokenizer's table) in UTF-8, UTF-16 or UTF-32.

    Raises OSError, or ValueError if it is damaged, not a regular file or over the size limit (bundle/files.py).
    """
    if is_table(path.name):
        return files.read_json(path, files.MOST_TABLE, files.MOST_TABLE_VALUES)
    return files.read_json(path)


def has_mark(path: Path) -> bool:
    """Whether a file begins with a byte order mark, which diffusers and transformers cannot read."""
    with path.open("rb") as file:
        return _encoding(file.read(4)) is not None


def without_mark(path: Path) -> str:
    """A text without its byte order mark."""
    data = path.read_bytes()
    return data.decode(_encoding(data[:4]) or "utf-8")


def _encoding(head: bytes) -> str | None:
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), None)

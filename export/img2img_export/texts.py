"""Texts as editors on Windows write them: with a byte order mark, in UTF-8 or UTF-16."""

import codecs
import json
from pathlib import Path
from typing import Any

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def parse_json(data: str | bytes) -> Any:
    """The value that a JSON text is. Raises ValueError if it is damaged, or nested so deeply that only an attacker writes it."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """The contents of a JSON file, in UTF-8, UTF-16 or UTF-32. Raises OSError, and ValueError if it is damaged."""
    return parse_json(path.read_bytes())


def has_mark(path: Path) -> bool:
    """Whether a file begins with a byte order mark, which diffusers and transformers do not read over."""
    with path.open("rb") as file:
        return _encoding(file.read(4)) is not None


def without_mark(path: Path) -> str:
    """A text without its byte order mark."""
    data = path.read_bytes()
    return data.decode(_encoding(data[:4]) or "utf-8")


def _encoding(head: bytes) -> str | None:
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), None)

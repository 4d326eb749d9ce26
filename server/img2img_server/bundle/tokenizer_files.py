"""Checks a tokenizer's files: only words, and rules whose time and memory are proportional to the text, are allowed.

The library `tokenizers` runs all rules of a tokenizer.json. Some make a text a million times as long, or pad it to billions of
tokens, and then the library ends the whole process when memory is short; and a regular expression can take exponential time.
Standard library only.
"""

import base64
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from img2img_server.bundle.files import MOST_TABLE, MOST_TABLE_VALUES, read_bytes, read_json

TOKENIZER = re.compile(r"tokenizer(\..*)?\.json", re.IGNORECASE)
"""transformers also reads versioned files such as `tokenizer.4.0.0.json`."""

_MOST_TEXT, _MOST_LINES = 16 * 2**20, 2**20
"""Maximum bytes and lines of a table that is not JSON (merges.txt, vocab.txt, spiece.model: at most 5 MiB in use)."""
_MOST_WORDS, _MOST_ADDED = 2**20, 2**15
"""Maximum words of a vocabulary (merges may be twice as many), and added tokens (Gemma 3 has 6,415)."""
_MOST_RULES, _MOST_STRING, _MOST_PATTERN, _MOST_NUMBER = 2000, 64, 2000, 2**20
"""Maximum number of values outside the vocabulary, characters of a string and of a regular expression, and largest number."""
_MOST_REPEATS = 2
"""Maximum number of unbounded repetitions in one alternative: GPT-4o's pattern has two."""
_MOST_GROWTH = 64
"""Maximum factor by which all rules together may lengthen a text."""
_RULES = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")

_ESCAPED = re.compile(r"\\.", re.DOTALL)
_CLASS = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]")
_REPEATED_GROUP = re.compile(r"\)\s*(?:[*+]|\{)")
_UNBOUNDED = re.compile(r"[*+]|\{\d*,\}")
_REFERENCE = re.compile(r"\\[1-9kg]")
_EXTENDED = re.compile(r"\(\?(?:[a-wyz-]*x|[~({])")
"""Comments in a pattern, which can hide a repeated group, and Oniguruma's extensions."""


def is_table(name: str) -> bool:
    """Whether a file of this name is a tokenizer's JSON table, which may be larger than a configuration."""
    return TOKENIZER.fullmatch(name) is not None or name.lower() in ("vocab.json", "added_tokens.json")


def is_slow(pattern: str, most_repeats: int = _MOST_REPEATS) -> bool:
    """Whether a regular expression may take exponential time, or time that grows with a high power of the text's length: it
    repeats a group, has back-references, is very long, or has more than `most_repeats` unbounded repetitions in one
    alternative."""
    plain = _CLASS.sub("c", _ESCAPED.sub("e", pattern))
    refers = _REFERENCE.search(pattern.replace("\\\\", ""))
    if len(pattern) > _MOST_PATTERN or refers or _EXTENDED.search(pattern) or _REPEATED_GROUP.search(plain):
        return True
    return any(len(_UNBOUNDED.findall(part)) > most_repeats for part in plain.split("|"))


def refuse_tables(path: Path) -> None:
    """Raises ValueError with the reason if the file at `path` is a tokenizer's table that is too expensive to read or to use.

    Other files pass. Raises OSError if it cannot be read.
    """
    name = path.name.lower()
    if name.endswith((".txt", ".model", ".jinja")):
        if read_bytes(path, _MOST_TEXT).count(b"\n") > _MOST_LINES and not name.endswith(".model"):
            raise ValueError(f"it has more than {_MOST_LINES} lines")
    elif is_table(name):
        table = read_json(path, MOST_TABLE, MOST_TABLE_VALUES)
        if not isinstance(table, dict):
            raise ValueError("it is not an object")
        if TOKENIZER.fullmatch(name):
            _refuse_tokenizer(table)
        elif len(table) > (_MOST_WORDS if name == "vocab.json" else _MOST_ADDED):
            raise ValueError(f"it has {len(table)} words, more than a tokenizer may have")


def _refuse_tokenizer(table: dict[str, Any]) -> None:
    model = table.get("model")
    model = model if isinstance(model, dict) else {}
    counts = (
        ("words", model.get("vocab"), _MOST_WORDS),
        ("merges", model.get("merges"), 2 * _MOST_WORDS),
        ("added tokens", table.get("added_tokens"), _MOST_ADDED),
    )
    for what, found, most in counts:
        if isinstance(found, dict | list) and len(found) > most:
            raise ValueError(f"it has {len(found)} {what}, the maximum is {most}")
    rules = {key: value for key, value in table.items() if key not in ("model", "added_tokens")}
    rules["model"] = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    if len(values := list(_values(rules, ""))) > _MOST_RULES:
        raise ValueError(f"its rules have {len(values)} values, the maximum is {_MOST_RULES}")
    for key, value in values:
        _refuse_value(key, value)
    growth = 1
    for key in _RULES:
        growth *= _growth(table.get(key))
    if growth > _MOST_GROWTH:
        raise ValueError(f"its rules can make a text more than {_MOST_GROWTH} times as long")


def _refuse_value(key: str, value: Any) -> None:
    if key == "precompiled_charsmap" and isinstance(value, str):
        _refuse_map(value)
    elif key == "Regex" and isinstance(value, str):
        if is_slow(value):
            raise ValueError(f"the regular expression {value[:80]!r} can take very long: repeated groups are not allowed")
    elif isinstance(value, str) and len(value) > _MOST_STRING:
        raise ValueError(f"{key} has {len(value)} characters, the maximum is {_MOST_STRING}")
    elif isinstance(value, int | float) and not abs(value) <= _MOST_NUMBER:
        raise ValueError(f"{key} is {value}, the maximum is {_MOST_NUMBER}")


def _values(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """All nested values with their keys (of the innermost object), and the keys of objects."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield "key", name
            yield from _values(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _values(inner, key)
    else:
        yield key, value


def _growth(rule: Any) -> int:
    """Maximum factor by which a rule lengthens a text: that of its inserted content times that of its inner rules."""
    if isinstance(rule, list):
        product = 1
        for one in rule:
            product = min(product * _growth(one), _MOST_GROWTH + 1)
        return product
    if not isinstance(rule, dict):
        return 1
    put = rule.get("content") if rule.get("type") == "Replace" else None
    own = max(1, len(put)) if isinstance(put, str) else 1
    return own * _growth([inner for inner in rule.values() if isinstance(inner, dict | list)])


def _refuse_map(text: str) -> None:
    """Checks sentencepiece's character map: the length of an index, the index, and the replacements, each with a final zero."""
    data = base64.b64decode(text, validate=True)
    if len(data) < 4:
        return
    (length,) = struct.unpack("<I", data[:4])
    if any(len(put) > _MOST_STRING for put in data[4 + length :].split(b"\0")):
        raise ValueError("its character map can make a text many times as long")

"""What a tokenizer's files may ask for: words, and rules that take time and memory in proportion to the text.

The library `tokenizers` runs whatever rules a tokenizer.json has. Some make a text a million times as long, or pad it to billions
of tokens, and then the library ends the whole process when memory is short; and a regular expression can take exponential time.
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
"""transformers also takes `tokenizer.4.0.0.json`, by its version."""

_MOST_TEXT, _MOST_LINES = 16 * 2**20, 2**20
"""Bytes of a table that is no JSON (merges.txt, vocab.txt, spiece.model: 5 MiB at most in use), and lines of it."""
_MOST_WORDS, _MOST_ADDED = 2**20, 2**15
"""Words of a vocabulary, or merges of them twice as many; tokens that are added to it (Gemma 3 has 6,415)."""
_MOST_RULES, _MOST_STRING, _MOST_PATTERN, _MOST_NUMBER = 2000, 64, 2000, 2**20
"""Values outside the vocabulary, characters of a string among them and of a regular expression, and the largest number."""
_MOST_REPEATS = 2
"""Unbounded repetitions in one alternative: GPT-4o's pattern has two."""
_MOST_GROWTH = 64
"""How many times as long the normalizers, and then the pre-tokenizers, may make a text."""
_RULES = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")

_ESCAPED = re.compile(r"\\.", re.DOTALL)
_CLASS = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]")
_REPEATED_GROUP = re.compile(r"\)\s*(?:[*+]|\{)")
_UNBOUNDED = re.compile(r"[*+]|\{\d*,\}")
_REFERENCE = re.compile(r"\\[1-9kg]")
_EXTENDED = re.compile(r"\(\?(?:[a-wyz-]*x|[~({])")
"""Comments within a pattern, which hide what is repeated, and what Oniguruma has beside regular expressions."""


def is_table(name: str) -> bool:
    """Whether a file of this name is a JSON table of a tokenizer, which may be larger than a configuration."""
    return TOKENIZER.fullmatch(name) is not None or name.lower() in ("vocab.json", "added_tokens.json")


def is_slow(pattern: str, most_repeats: int = _MOST_REPEATS) -> bool:
    """Whether a regular expression may take exponential time, or time by a high power of the text's length: it repeats a group,
    refers back to one, is very long, or has more than `most_repeats` unbounded repetitions in one alternative."""
    plain = _CLASS.sub("c", _ESCAPED.sub("e", pattern))
    refers = _REFERENCE.search(pattern.replace("\\\\", ""))
    if len(pattern) > _MOST_PATTERN or refers or _EXTENDED.search(pattern) or _REPEATED_GROUP.search(plain):
        return True
    return any(len(_UNBOUNDED.findall(part)) > most_repeats for part in plain.split("|"))


def refuse_tables(path: Path) -> None:
    """Raises ValueError, which says why, if the file at `path` is a tokenizer's table that takes too much to read or to use.

    Files that are no tables pass. Raises OSError if it cannot be read.
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
            raise ValueError(f"it has {len(table)} words, more than any tokenizer")


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
            raise ValueError(f"it has {len(found)} {what}, more than any tokenizer")
    rules = {key: value for key, value in table.items() if key not in ("model", "added_tokens")}
    rules["model"] = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    if len(values := list(_values(rules, ""))) > _MOST_RULES:
        raise ValueError(f"its rules have {len(values)} values, more than {_MOST_RULES}")
    for key, value in values:
        _refuse_value(key, value)
    growth = 1
    for key in _RULES:
        growth *= _growth(table.get(key))
    if growth > _MOST_GROWTH:
        raise ValueError("its rules can make a text many times as long as it was")


def _refuse_value(key: str, value: Any) -> None:
    if key == "precompiled_charsmap" and isinstance(value, str):
        _refuse_map(value)
    elif key == "Regex" and isinstance(value, str):
        if is_slow(value):
            raise ValueError(f"the regular expression {value[:80]!r} can take very long: groups are not repeated in such rules")
    elif isinstance(value, str) and len(value) > _MOST_STRING:
        raise ValueError(f"{key} is a text of {len(value)} characters, more than {_MOST_STRING}")
    elif isinstance(value, int | float) and not abs(value) <= _MOST_NUMBER:
        raise ValueError(f"{key} is {value}, more than {_MOST_NUMBER}")


def _values(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every value below, with the key that it has or is in; the keys of objects, too."""
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
    """How many times as long a rule makes a text at most: by what it puts in, times that of the rules in it."""
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
    """sentencepiece's table of characters: the length of an index, the index, what characters become with a zero after each."""
    data = base64.b64decode(text, validate=True)
    if len(data) < 4:
        return
    (length,) = struct.unpack("<I", data[:4])
    if any(len(put) > _MOST_STRING for put in data[4 + length :].split(b"\0")):
        raise ValueError("its table of characters makes a text many times as long as it was")

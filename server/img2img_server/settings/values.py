"""Parses settings' values from text and TOML by the type of their field, and formats them."""

import json
import re
import threading
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, get_origin

from img2img_server.settings.setting import Setting

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_BYTES = {"b": Fraction(1)} | {
    unit: Fraction(base) ** power
    for base, units in ((1000, ("kb", "mb", "gb", "tb")), (1024, ("kib", "mib", "gib", "tib")))
    for power, unit in enumerate(units, start=1)
}
_SECONDS = {unit: Fraction(text) for unit, text in (("ms", "0.001"), ("s", "1"), ("m", "60"), ("h", "3600"), ("d", "86400"))}
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", re.ASCII)


def from_text(one: Setting, text: str) -> Any:
    """Parses the text of a flag or variable. Raises ValueError; the message follows the setting's name."""
    kind = one.kind
    if one.about.parse is not None:
        value = one.about.parse(text)
    elif get_origin(kind) is tuple:
        value = tuple(_plain(word.strip()) for word in text.split(",")) if text.strip() else ()
    elif kind is bool:
        value = _switch(text)
    elif kind is int:
        value = _whole(text, one.about.metavar == "BYTES")
    elif kind is float:
        value = _number(text, one.about.metavar == "SECONDS")
    elif kind is Path:
        value = _path(text)
    else:
        value = _plain(text)
        if one.about.is_path is not None and one.about.is_path(value):
            value = str(_path(value))
    one.check(value)
    return value


def from_toml(one: Setting, raw: Any, folder: Path) -> Any:
    """Converts a value of a TOML file in `folder`, the base of relative paths. Raises ValueError; the message follows its
    name."""
    kind, units = one.kind, one.about.metavar in ("BYTES", "SECONDS")
    number = isinstance(raw, int | float) and not isinstance(raw, bool)
    if isinstance(raw, str) and (kind not in (bool, int, float) or (units and kind is not bool)):
        value = _below(one, from_text(one, raw), folder)
    elif get_origin(kind) is tuple and one.about.parse is None and isinstance(raw, list):
        if not all(isinstance(word, str) for word in raw):
            raise ValueError("contains an item that is not a string")
        value = tuple(map(_plain, raw))
    elif (kind is int and number and isinstance(raw, int)) or (kind is bool and isinstance(raw, bool)):
        value = raw
    elif kind is float and number:
        value = _finite(raw)
    else:
        raise ValueError(f"is {json.dumps(raw, default=str)}, expected {_wanted(one)}")
    one.check(value)
    return value


def to_toml(one: Setting, value: Any) -> str:
    """A value, not None, as TOML; the inverse of `from_toml`. Paths become absolute, so that the file can be moved."""
    if one.about.parse is not None:
        return _quoted(one.about.write(value))
    if isinstance(value, Path) or (one.about.is_path is not None and one.about.is_path(value)):
        return _quoted(str(Path(value).absolute()))
    if isinstance(value, tuple):
        return f"[{', '.join(map(_quoted, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return _quoted(value) if isinstance(value, str) else repr(value)


def for_people(one: Setting, value: Any) -> str:
    """A value, not None, as shown by `--help`."""
    if one.about.parse is not None:
        return one.about.write(value)
    if isinstance(value, tuple):
        return ",".join(value) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if one.about.metavar == "BYTES" and value and value % 2**20 == 0:
        return f"{value // 2**30} GiB" if value % 2**30 == 0 else f"{value // 2**20} MiB"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _switch(text: str) -> bool:
    word = text.strip().lower()
    if word not in (*_TRUE, *_FALSE):
        raise ValueError(f"is '{text}', expected true or false")
    return word in _TRUE


def _whole(text: str, units: bool) -> int:
    try:
        return int(text)
    except ValueError:
        quantity = _quantity(text, _BYTES) if units else None
        if quantity is None:
            such = "a number of bytes, or a size such as 500MB or 1.5GiB" if units else "an integer"
            raise ValueError(f"is '{text}', expected {such}") from None
        return int(quantity)


def _number(text: str, units: bool) -> float:
    try:
        number = float(text)
    except ValueError:
        quantity = _quantity(text, _SECONDS) if units else None
        if quantity is None:
            such = "a number of seconds, or a time such as 90s, 15m or 24h" if units else "a number"
            raise ValueError(f"is '{text}', expected {such}") from None
        return _finite(quantity)
    return _finite(number)


def _quantity(text: str, units: Mapping[str, Fraction]) -> Fraction | None:
    """A number with a unit, such as "1.5GiB", multiplied by it; None if the text is none."""
    found = _QUANTITY.fullmatch(text.strip())
    unit = units.get(found[2].lower()) if found else None
    return None if found is None or unit is None else Fraction(found[1]) * unit


def _finite(number: float | Fraction) -> float:
    """The number, within the platform's limit for timeouts in seconds (292 years). Raises ValueError."""
    if not -threading.TIMEOUT_MAX <= number <= threading.TIMEOUT_MAX:  # also false for NaN
        raise ValueError(f"is {number}, the maximum is {threading.TIMEOUT_MAX:g}")
    return float(number)


def _path(text: str) -> Path:
    try:
        return Path(_plain(text)).expanduser()
    except RuntimeError:
        raise ValueError(f"is '{text}', but this home directory does not exist") from None


def _plain(text: str) -> str:
    """The text if it is valid. Raises ValueError if it is empty, which usually is a mistake, or not valid UTF-8."""
    if not text:
        raise ValueError("is empty")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"is {text!r}, which is not valid UTF-8")
    return text


def _below(one: Setting, value: Any, folder: Path) -> Any:
    """The value, with relative paths resolved against `folder`."""
    if isinstance(value, Path):
        return folder / value
    if one.about.is_path is not None and one.about.is_path(value):
        return str(folder / value)
    return value


def _quoted(text: str) -> str:
    """A basic string of TOML: JSON's escapes are valid TOML if characters beyond the first plane are not escaped; TOML escapes
    DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _wanted(one: Setting) -> str:
    """The expected type of a value in a file, for errors."""
    if get_origin(one.kind) is tuple and one.about.parse is None:
        return "an array of strings"
    return {bool: "true or false", int: "an integer", float: "a number"}.get(one.kind, "a string in quotes")

"""Reads settings from flags, environment, a TOML file and defaults, in this order of precedence, and records their origins.

Parses values from text and TOML by the type of their field, and formats them.

Independent of a particular configuration: works for any dataclass declared as in setting.py.
"""

import argparse
import difflib
import json
import re
import threading
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Generic, TypeVar, get_origin

from img2img_server.settings.setting import FieldPath, Setting, build, settings_of, value_of

_T = TypeVar("_T")

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_BYTES = {"b": Fraction(1)} | {
    unit: Fraction(base) ** power
    for base, units in ((1000, ("kb", "mb", "gb", "tb")), (1024, ("kib", "mib", "gib", "tib")))
    for power, unit in enumerate(units, start=1)
}
_SECONDS = {unit: Fraction(text) for unit, text in (("ms", "0.001"), ("s", "1"), ("m", "60"), ("h", "3600"), ("d", "86400"))}
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", re.ASCII)

DEFAULT, FLAG = "default", "flag"
"""Origins of values, in addition to the names of variables and files."""


class SettingError(ValueError):
    """A setting is invalid. The message is one line and names the flag, variable or file."""


class MissingSetting(SettingError):
    """A required setting is not set. `name` is its name."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__(f"{name} is not set: give {where}")
        self.name = name


@dataclass(frozen=True, slots=True)
class Configured(Generic[_T]):
    """A configuration and the origin of each value: DEFAULT, FLAG, or the name of a variable or file."""

    config: _T
    origins: Mapping[FieldPath, str]


@dataclass(frozen=True, slots=True)
class Environment:
    """A process's variables. All with the `prefix` are settings, except `others`, which are read elsewhere."""

    variables: Mapping[str, str]
    prefix: str
    others: Sequence[str] = ()

    def variable(self, one: Setting) -> str:
        """The name of a setting's variable."""
        return self.prefix + one.name.upper()


def declare(parser: argparse.ArgumentParser, settings: Iterable[Setting]) -> None:
    """Declares a flag for each setting, under the heading of its section. A flag that is not given has the value None."""
    groups: dict[str, argparse._ActionsContainer] = {"": parser}
    for one in settings:
        if one.group not in groups:
            groups[one.group] = parser.add_argument_group(one.group)
        add = groups[one.group].add_argument
        if one.kind is bool:
            add(one.flag, action=argparse.BooleanOptionalAction, default=None, help=_help(one))
        else:
            add(one.flag, type=_Reader(one), metavar=_metavar(one), help=_help(one))


def given(settings: Iterable[Setting], arguments: argparse.Namespace) -> dict[FieldPath, Any]:
    """The values of the given flags, for `build` or `resolve`."""
    values = {one.path: getattr(arguments, one.name) for one in settings}
    return {path: value for path, value in values.items() if value is not None}


def resolve(kind: type[_T], flags: Mapping[FieldPath, Any], environment: Environment, file: Path | None = None) -> Configured[_T]:
    """Reads a configuration from flags, environment and a file, in this order of precedence.

    Raises SettingError for an invalid value, an unknown variable or key, or a missing setting, and OSError if the file cannot be
    read.
    """
    settings = settings_of(kind)
    values: dict[FieldPath, Any] = {}
    origins: dict[FieldPath, str] = dict.fromkeys((one.path for one in settings), DEFAULT)
    for path, value, origin in (
        *(_from_file(settings, file) if file is not None else ()),
        *_from_environment(settings, environment),
        *((path, value, FLAG) for path, value in flags.items()),
    ):
        values[path], origins[path] = value, origin
    for one in settings:
        if one.about.required and one.path not in values:
            where = f"{one.flag} {_metavar(one)}, the variable {environment.variable(one)} or the key '{one.key}' in a file"
            raise MissingSetting(one.name, where)
    try:
        return Configured(build(kind, values), origins)
    except ValueError as error:
        raise SettingError(str(error)) from None


def as_toml(configured: Configured[Any]) -> str:
    """The configuration as a TOML file, with each value's origin as a comment."""
    lines: list[str] = []
    table: FieldPath = ()
    for one in settings_of(type(configured.config)):
        if one.path[:-1] != table:
            table = one.path[:-1]
            lines += ["", f"# {one.group}", f"[{'.'.join(table)}]"]
        value = value_of(configured.config, one)
        if value is None:
            lines.append(f"# {one.path[-1]} = (not set)")
        else:
            lines.append(f"{one.path[-1]} = {to_toml(one, value)}  # {configured.origins[one.path]}")
    return "\n".join(lines) + "\n"


class _Reader:
    """Reads a flag's value."""

    def __init__(self, one: Setting) -> None:
        self._one = one

    def __call__(self, text: str) -> Any:
        try:
            return from_text(self._one, text)
        except ValueError as error:
            raise argparse.ArgumentError(None, f"{self._one.flag} {error}") from None


def _metavar(one: Setting) -> str:
    names = {int: "N", float: "N", Path: "PATH", bool: "true|false"}
    return one.about.metavar or (f"{{{','.join(one.choices)}}}" if one.choices else names.get(one.kind, "TEXT"))


def _help(one: Setting) -> str:
    text = one.about.help
    if "(default" not in text and not one.optional and not one.about.required:
        text += f" (default: {for_people(one, one.default)})"
    return text.replace("%", "%%")


def _from_environment(settings: Sequence[Setting], environment: Environment) -> Iterator[tuple[FieldPath, Any, str]]:
    known = {environment.variable(one): one for one in settings}
    for variable, text in environment.variables.items():
        if variable in known:
            try:
                if not text.strip() and get_origin(known[variable].kind) is tuple:
                    raise ValueError("is empty")  # not an empty list: more likely the variable was not filled in
                yield known[variable].path, from_text(known[variable], text), variable
            except ValueError as error:
                raise SettingError(f"{variable} {error}") from None
        elif variable.startswith(environment.prefix) and variable not in environment.others:
            near = difflib.get_close_matches(variable, (*known, *environment.others), 1)
            raise SettingError(f"unknown setting {variable}{_meant(near)}")


def _from_file(settings: Sequence[Setting], file: Path) -> Iterator[tuple[FieldPath, Any, str]]:
    """The settings in a file. Relative paths in it are relative to its folder."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # tomllib's own, and malformed UTF-8, long numbers and deep arrays
        raise SettingError(f"{file}: {error}") from None
    known = {one.path: one for one in settings}
    tables = {path[:end] for path in known for end in range(1, len(path))}
    for path, raw in _leaves(content, tables):
        if path not in known:
            raise SettingError(f"{file}: {_unknown(path, raw, settings, tables)}")
        try:
            yield path, from_toml(known[path], raw, file.parent), file.name.encode("ascii", "backslashreplace").decode()
        except ValueError as error:
            raise SettingError(f"{file}: {known[path].key} {error}") from None


def _leaves(content: Mapping[str, Any], tables: set[FieldPath], above: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    """The values of a file with their paths. An unknown table, or a value in place of a known table, counts as a leaf."""
    for key, value in content.items():
        path = (*above, key)
        if path in tables and isinstance(value, dict):
            yield from _leaves(value, tables, path)
        else:
            yield path, value


def _unknown(path: FieldPath, raw: Any, settings: Sequence[Setting], tables: set[FieldPath]) -> str:
    """The error for an unknown key, with a suggestion."""
    key = ".".join(path)
    if path in tables:
        return f"{key} must be a table, [{key}]"
    if isinstance(raw, dict):
        near = difflib.get_close_matches(key, [".".join(table) for table in tables], 1)
        return f"unknown table [{key}]{_meant([f'[{name}]' for name in near])}"
    beside = {one.path[-1]: one.key for one in settings if one.path[:-1] == path[:-1]}
    # Otherwise it may be in the wrong table, or spelled like its flag.
    anywhere = {one.path[-1]: one.key for one in settings} | {one.name: one.key for one in settings}
    near = [names[name] for names in (beside, anywhere) for name in difflib.get_close_matches(path[-1], names, 1)]
    return f"unknown key '{key}'{_meant([repr(name) for name in near])}"


def _meant(near: Sequence[str]) -> str:
    return f"; did you mean {near[0]}?" if near else ""


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

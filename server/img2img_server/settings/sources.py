"""Reads settings from flags, environment, a TOML file and defaults, in this order of precedence, and records their origins.

Independent of a particular configuration: works for any dataclass declared as in setting.py.
"""

import argparse
import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_origin

from img2img_server.settings.setting import FieldPath, Setting, build, settings_of, value_of
from img2img_server.settings.values import for_people, from_text, from_toml, to_toml

_T = TypeVar("_T")

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
    """A process's variables. Those with the `prefix` are settings, except `others`, which are read elsewhere."""

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

"""Declares settings: each field of a configuration defines its flag, environment variable and key in a file.

A configuration is a frozen dataclass whose fields are created by `setting`, or by `section` for a nested dataclass of settings.
sources.py reads flags, environment and files.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

_T = TypeVar("_T")

FieldPath = tuple[str, ...]
"""The field names from a configuration to one of its settings."""


@dataclass(frozen=True, slots=True)
class About:
    """The metadata of a setting's field in addition to its type and default.

    `name` replaces the field's name in the flag and the variable; the key in a file is always the field's name, in the table of
    its section. `metavar` represents the value in `--help`; values of BYTES and SECONDS accept units. `parse` reads the value
    from text if its type is not sufficient, and raises ValueError; `write` is its inverse. `least` and `most` limit a number. A
    `required` setting has no default. `is_path` decides whether a text is a path. `group` is the heading of a section's settings,
    `prefix` the common prefix of their flags and variables.
    """

    help: str = ""
    name: str = ""
    metavar: str = ""
    choices: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None
    write: Callable[[Any], str] = str
    least: float | None = None
    most: float | None = None
    required: bool = False
    is_path: Callable[[str], bool] | None = None
    group: str = ""
    prefix: str = ""


def setting(default: _T, help: str, **about: Any) -> _T:
    """A field of a configuration. `about` are further fields of About."""
    made: Any = field(default=default, metadata={"about": About(help=help, **about)})
    return made  # type: ignore[no-any-return]


def section(kind: Callable[[], _T], group: str, prefix: str = "") -> _T:
    """A field with nested settings, of the dataclass `kind`, under the heading `group`."""
    made: Any = field(default_factory=kind, metadata={"about": About(group=group, prefix=prefix)})
    return made  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a configuration.

    `path` are the field names that lead to it, `name` is its flat name. `kind` is its type without None; an `optional` one may be
    None, which cannot be written as text. `group` is the heading of its section.
    """

    path: FieldPath
    name: str
    kind: Any
    optional: bool
    default: Any
    about: About
    group: str

    @property
    def flag(self) -> str:
        """Its flag, such as "--max-batch-size"."""
        return "--" + self.name.replace("_", "-")

    @property
    def key(self) -> str:
        """Its key in a file including its tables, such as "limits.max_batch_size"."""
        return ".".join(self.path)

    @property
    def choices(self) -> tuple[str, ...]:
        """Its allowed values; empty if they are not enumerated."""
        return self.about.choices or (get_args(self.kind) if get_origin(self.kind) is Literal else ())

    def check(self, value: Any) -> None:
        """Raises ValueError if the value is out of bounds. The message follows the setting's name."""
        if value is None:
            return
        if self.about.least is not None and value < self.about.least:
            raise ValueError(f"is {value}, the minimum is {self.about.least:g}")
        if self.about.most is not None and value > self.about.most:
            raise ValueError(f"is {value}, the maximum is {self.about.most:g}")
        if self.choices and value not in self.choices:
            near = difflib.get_close_matches(str(value), self.choices, 1, cutoff=0.7)
            meant = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"is '{value}', expected one of {', '.join(self.choices)}{meant}")


def settings_of(kind: type) -> tuple[Setting, ...]:
    """All settings of the configuration `kind`: its own first, then those of its sections."""
    return tuple(sorted(_settings(kind, (), "", ""), key=lambda one: len(one.path)))


def check(config: Any) -> None:
    """Checks all values of a configuration. Raises ValueError naming the setting."""
    for one in settings_of(type(config)):
        try:
            one.check(value_of(config, one))
        except ValueError as error:
            raise ValueError(f"{one.name} {error}") from None


def value_of(config: Any, one: Setting) -> Any:
    """The value of the setting `one` in `config`."""
    for name in one.path:
        config = getattr(config, name)
    return config


def build(kind: type[_T], values: Mapping[FieldPath, Any]) -> _T:
    """The configuration with these values and defaults for all others. Raises ValueError if the configuration refuses them."""
    return _build(kind, (), values)


def _build(kind: type[_T], path: FieldPath, values: Mapping[FieldPath, Any]) -> _T:
    hints = get_type_hints(kind)
    made = {}
    for item in fields(kind):  # type: ignore[arg-type]
        below = (*path, item.name)
        if is_dataclass(hints[item.name]):
            made[item.name] = _build(hints[item.name], below, values)
        elif below in values:
            made[item.name] = values[below]
    return kind(**made)


def _settings(kind: type, path: FieldPath, group: str, prefix: str) -> Iterator[Setting]:
    hints = get_type_hints(kind)
    for item in fields(kind):
        about: About = item.metadata["about"]
        hint, below = hints[item.name], (*path, item.name)
        if is_dataclass(hint):
            yield from _settings(hint, below, about.group, prefix + about.prefix)  # type: ignore[arg-type]
        else:
            bare, optional = _without_none(hint)
            yield Setting(below, prefix + (about.name or item.name), bare, optional, item.default, about, group)


def _without_none(hint: Any) -> tuple[Any, bool]:
    """A type without None, and whether it allowed None."""
    if get_origin(hint) not in (Union, UnionType):
        return hint, False
    (bare,) = (kind for kind in get_args(hint) if kind is not NoneType)
    return bare, True

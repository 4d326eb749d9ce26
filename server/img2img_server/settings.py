"""Settings, written once: what a field of the configuration says of itself becomes its flag, variable and key in a file."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class About:
    """What a setting's field says beside its type and its default: what people read of it, and how it is spelled.

    `name` is the one that its flag, its variable and its key come from, where that is not the field's. `metavar` stands for the
    value in `--help`. `parse` reads it from text where the type does not say how, and raises ValueError. `group` gives the
    settings of a section a heading, and `prefix` their names a common beginning.
    """

    help: str = ""
    name: str = ""
    metavar: str = ""
    choices: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None
    least: float | None = None
    group: str = ""
    prefix: str = ""


def setting(default: _T, help: str, **about: Any) -> _T:
    """A field of a configuration, with what its readers see of it: About's fields."""
    made: Any = field(default=default, metadata={"about": About(help=help, **about)})
    return made  # type: ignore[no-any-return]


def section(kind: Callable[[], _T], group: str, prefix: str = "") -> _T:
    """A field that holds settings of its own, of the dataclass `kind`, under the heading `group`."""
    made: Any = field(default_factory=kind, metadata={"about": About(group=group, prefix=prefix)})
    return made  # type: ignore[no-any-return]

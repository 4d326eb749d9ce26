"""The parameters of a ModelInferRequest, each of which is read once, as what it should be."""

from collections.abc import Mapping
from typing import Any, TypeVar

from img2img_server.api.kserve.tensors import shown
from img2img_server.errors import InvalidField

_T = TypeVar("_T")
_KINDS = {
    "bool_param": "a bool",
    "int64_param": "an integer",
    "uint64_param": "an integer",
    "string_param": "a text",
    "double_param": "a number",
}


class Parameters:
    """Parameters by name. Every reader gives None for one that is not there, and raises InvalidField for one of another type."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self._parameters = parameters
        self._known: set[str] = set()

    def text(self, name: str) -> str | None:
        """A text."""
        value: str | None = self._read(name, "a text", "string_param")
        return value

    def integer(self, name: str, bits: int) -> int | None:
        """An integer that a signed one of so many bits holds."""
        value: int | None = self._read(name, "an integer", "int64_param", "uint64_param")
        if value is not None and not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
            raise InvalidField(name, f"{value} needs more than {bits} bits")
        return value

    def number(self, name: str) -> float | None:
        """A number."""
        value = self._read(name, "a number", "double_param", "int64_param", "uint64_param")
        return None if value is None else float(value)

    def word_or_integer(self, name: str) -> str | int | None:
        """A text, or an integer, which may be given as a text."""
        value: str | int | None = self._read(name, "a string or an integer", "string_param", "int64_param", "uint64_param")
        return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value

    def truth(self, name: str) -> bool:
        """True or false, which is also what none means."""
        return bool(self._read(name, "a bool", "bool_param"))

    def one_of(self, name: str, choices: Mapping[str, _T]) -> _T | None:
        """What one of these words stands for, in upper or lower case."""
        word = self.text(name)
        if word is None:
            return None
        if word.lower() not in choices:
            raise InvalidField(name, f"{shown(word)} is not one of {', '.join(choices)}")
        return choices[word.lower()]

    def finish(self) -> None:
        """Raises InvalidField where there is one that nobody reads."""
        for name in sorted(self._parameters):
            if name not in self._known:
                raise InvalidField("parameters", f"unknown parameter {shown(name)}; known are {', '.join(sorted(self._known))}")

    def _read(self, name: str, wanted: str, *kinds: str) -> Any:
        self._known.add(name)
        if name not in self._parameters:
            return None
        kind = self._parameters[name].WhichOneof("parameter_choice")
        if kind not in kinds:
            raise InvalidField(name, f"the parameter is {_KINDS.get(kind, 'of no type')}, expected {wanted}")
        return getattr(self._parameters[name], kind)

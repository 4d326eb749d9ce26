"""Fields of a form that are JSON lists of objects, such as `controls`: the elements as messages of the contract."""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from google.protobuf.message import Message

from img2img_server.api.http.forms import shown
from img2img_server.errors import InvalidField

_Made = TypeVar("_Made", bound=Message)
Put = Callable[[_Made, str, Any], None]
"""Sets the field of this name of a message to a value of JSON. Raises TypeError, ValueError or OverflowError for a wrong one."""


def is_json(text: str) -> bool:
    """Whether a text is meant as JSON, and not as a short form."""
    return text.lstrip().startswith(("[", "{"))


def read_list(text: str, name: str, kind: type[_Made], put: Put[_Made], expected: Mapping[str, str]) -> list[_Made]:
    """The messages of the field `name`, a JSON list of objects with the fields of the message `kind`. `expected` says for errors
    what the values of a field are; those of others are numbers. Raises InvalidField."""
    try:
        elements = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidField(name, "the text is not valid JSON") from None
    if not isinstance(elements, list):
        raise InvalidField(name, "the JSON is not a list of objects")
    return [_message(element, f"{name}[{index}]", kind(), put, expected) for index, element in enumerate(elements)]


def _message(element: Any, field: str, message: _Made, put: Put[_Made], expected: Mapping[str, str]) -> _Made:
    known = tuple(one.name for one in message.DESCRIPTOR.fields)
    if not isinstance(element, Mapping):
        raise InvalidField(field, f"an object is expected, with {', '.join(known)}")
    for name, value in element.items():
        if name not in known:
            raise InvalidField(f"{field}.{shown(name)}", f"unknown field: known are {', '.join(known)}")
        try:
            if isinstance(value, bool):  # which protobuf takes for a number
                raise TypeError
            put(message, name, value)
        except (TypeError, ValueError, OverflowError):
            what = expected.get(name, "a number")
            raise InvalidField(f"{field}.{name}", f"{shown(json.dumps(value))} is not {what}") from None
    return message

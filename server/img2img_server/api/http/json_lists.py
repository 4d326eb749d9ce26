"""The fields `controls` and `image_prompts` of a form: short texts, or JSON lists of objects with the fields of a message."""

import json
from collections.abc import Callable, Mapping, MutableSequence
from typing import Any, TypeVar

from google.protobuf.message import Message
from img2img.v1 import image_to_image_pb2 as pb

from img2img_server.api.controls import controls_from
from img2img_server.api.http.forms import shown
from img2img_server.api.image_prompts import image_prompts_from
from img2img_server.bundle.controls import MODE
from img2img_server.errors import InvalidField

_Made = TypeVar("_Made", bound=Message)
_Put = Callable[[_Made, str, Any], None]
"""Sets the field of this name of a message to a value of JSON. Raises TypeError, ValueError or OverflowError for a wrong one."""

CONTROL_IMAGES = "control_image"
"""The field of control images: files or addresses, in the order of `controls`."""
_CONTROL_VALUES = {"model": "a text", "image": "a text", MODE: "an integer"}
PROMPT_IMAGES = "prompt_image"
"""The field of the images of image prompts: files or addresses."""


def read_controls(text: str) -> list[pb.Control]:
    """Parses a JSON list of objects with the fields of a Control, whose `model` is an id and whose `image` an address, or a short
    text, as controls_from does. Raises InvalidField.
    """
    return _read_list(text, "controls", pb.Control, _put_control, _CONTROL_VALUES) if _is_json(text) else controls_from(text)


def add_control_images(controls: MutableSequence[pb.Control], images: list[pb.ImageSource]) -> None:
    """Gives the images of the form to the controls that have none, in order. Without controls, they are images for a
    built-in control input. Raises InvalidField if their numbers differ."""
    if not controls:
        controls.extend(pb.Control(image=image) for image in images)
        return
    without = [control for control in controls if control.image.WhichOneof("source") is None]
    if len(images) != len(without):
        raise InvalidField(CONTROL_IMAGES, f"there are {len(images)}, but {len(without)} of the controls need one")
    for control, image in zip(without, images, strict=True):
        control.image.CopyFrom(image)


def _put_control(control: pb.Control, name: str, value: Any) -> None:
    holder, attribute = {"model": (control.model, "path"), "image": (control.image, "uri")}.get(name, (control, name))
    setattr(holder, attribute, value)


def read_image_prompts(text: str) -> list[pb.ImagePrompt]:
    """Parses a JSON list of objects with the fields of an ImagePrompt, whose `images` are addresses, or a short text, as
    image_prompts_from does. Raises InvalidField."""
    if not _is_json(text):
        return image_prompts_from(text)
    expected = {"adapter": "a text", "images": "a list of texts"}
    return _read_list(text, "image_prompts", pb.ImagePrompt, _put_prompt, expected)


def _put_prompt(prompt: pb.ImagePrompt, name: str, value: Any) -> None:
    if name != "images":
        setattr(prompt, name, value)
        return
    if not isinstance(value, list):
        raise TypeError
    prompt.images.extend(pb.ImageSource(uri=uri) for uri in value)


def _is_json(text: str) -> bool:
    """Whether a text is meant as JSON, and not as a short form."""
    return text.lstrip().startswith(("[", "{"))


def _read_list(text: str, name: str, kind: type[_Made], put: _Put[_Made], expected: Mapping[str, str]) -> list[_Made]:
    """The messages of the field `name`, a JSON list of objects with the fields of the message `kind`. `expected` names the kinds
    of fields' values for errors; other fields are numbers. Raises InvalidField."""
    try:
        elements = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidField(name, "the text is not valid JSON") from None
    if not isinstance(elements, list):
        raise InvalidField(name, "the JSON is not a list of objects")
    return [_message(element, f"{name}[{index}]", kind(), put, expected) for index, element in enumerate(elements)]


def _message(element: Any, field: str, message: _Made, put: _Put[_Made], expected: Mapping[str, str]) -> _Made:
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

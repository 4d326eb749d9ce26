"""The control images of a form: the field `controls` as a short text or as JSON, and the images that the form sends for it."""

import json
from collections.abc import Mapping, MutableSequence
from typing import Any

from img2img.v1 import image_to_image_pb2 as pb

from img2img_server.api.controls import controls_from
from img2img_server.api.http.forms import shown
from img2img_server.bundle.controls import MODE
from img2img_server.errors import InvalidField

IMAGES = "control_image"
"""The field of control images: files or addresses, in the order of `controls`."""
_KNOWN = tuple(field.name for field in pb.Control.DESCRIPTOR.fields)


def read_controls(text: str) -> list[pb.Control]:
    """Parses a JSON list of objects with the fields of a Control, whose `model` is an id and whose `image` an address, or a short
    text, as controls_from does. Raises InvalidField.
    """
    if not text.lstrip().startswith(("[", "{")):
        return controls_from(text)
    try:
        elements = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidField("controls", "the text is not valid JSON") from None
    if not isinstance(elements, list):
        raise InvalidField("controls", "the JSON is not a list of objects")
    return [_control(element, f"controls[{index}]") for index, element in enumerate(elements)]


def add_images(controls: MutableSequence[pb.Control], images: list[pb.ImageSource]) -> None:
    """Gives the images of the form to the controls that have none, in order. Without controls, they are images that the model
    reads by itself. Raises InvalidField if their numbers differ."""
    if not controls:
        controls.extend(pb.Control(image=image) for image in images)
        return
    without = [control for control in controls if control.image.WhichOneof("source") is None]
    if len(images) != len(without):
        raise InvalidField(IMAGES, f"there are {len(images)}, but {len(without)} of the controls need one")
    for control, image in zip(without, images, strict=True):
        control.image.CopyFrom(image)


def _control(element: Any, field: str) -> pb.Control:
    if not isinstance(element, Mapping):
        raise InvalidField(field, f"an object is expected, with {', '.join(_KNOWN)}")
    control = pb.Control()
    for name, value in element.items():
        if name not in _KNOWN:
            raise InvalidField(f"{field}.{shown(name)}", f"unknown field: known are {', '.join(_KNOWN)}")
        holder, attribute = {"model": (control.model, "path"), "image": (control.image, "uri")}.get(name, (control, name))
        try:
            if isinstance(value, bool):  # which protobuf takes for a number
                raise TypeError
            setattr(holder, attribute, value)
        except (TypeError, ValueError, OverflowError):
            expected = "a text" if holder is not control else "an integer" if name == MODE else "a number"
            raise InvalidField(f"{field}.{name}", f"{shown(json.dumps(value))} is not {expected}") from None
    return control

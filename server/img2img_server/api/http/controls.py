"""The control images of a form: the field `controls` as a short text or as JSON, and the images that the form sends for it."""

from collections.abc import MutableSequence
from typing import Any

from img2img.v1 import image_to_image_pb2 as pb

from img2img_server.api.controls import controls_from
from img2img_server.api.http.json_lists import is_json, read_list
from img2img_server.bundle.controls import MODE
from img2img_server.errors import InvalidField

IMAGES = "control_image"
"""The field of control images: files or addresses, in the order of `controls`."""
_EXPECTED = {"model": "a text", "image": "a text", MODE: "an integer"}


def read_controls(text: str) -> list[pb.Control]:
    """Parses a JSON list of objects with the fields of a Control, whose `model` is an id and whose `image` an address, or a short
    text, as controls_from does. Raises InvalidField.
    """
    return read_list(text, "controls", pb.Control, _put, _EXPECTED) if is_json(text) else controls_from(text)


def add_images(controls: MutableSequence[pb.Control], images: list[pb.ImageSource]) -> None:
    """Gives the images of the form to the controls that have none, in order. Without controls, they are images for a
    built-in control input. Raises InvalidField if their numbers differ."""
    if not controls:
        controls.extend(pb.Control(image=image) for image in images)
        return
    without = [control for control in controls if control.image.WhichOneof("source") is None]
    if len(images) != len(without):
        raise InvalidField(IMAGES, f"there are {len(images)}, but {len(without)} of the controls need one")
    for control, image in zip(without, images, strict=True):
        control.image.CopyFrom(image)


def _put(control: pb.Control, name: str, value: Any) -> None:
    holder, attribute = {"model": (control.model, "path"), "image": (control.image, "uri")}.get(name, (control, name))
    setattr(holder, attribute, value)

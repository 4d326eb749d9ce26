"""The image prompts of a form: the field `image_prompts` as a short text or as JSON."""

from typing import Any

from img2img.v1 import image_to_image_pb2 as pb

from img2img_server.api.http.json_lists import is_json, read_list
from img2img_server.api.image_prompts import image_prompts_from

IMAGES = "prompt_image"
"""The field of the images of image prompts: files or addresses."""


def read_image_prompts(text: str) -> list[pb.ImagePrompt]:
    """Parses a JSON list of objects with the fields of an ImagePrompt, whose `images` are addresses, or a short text, as
    image_prompts_from does. Raises InvalidField."""
    if not is_json(text):
        return image_prompts_from(text)
    expected = {"adapter": "a text", "images": "a list of texts"}
    return read_list(text, "image_prompts", pb.ImagePrompt, _put, expected)


def _put(prompt: pb.ImagePrompt, name: str, value: Any) -> None:
    if name != "images":
        setattr(prompt, name, value)
        return
    if not isinstance(value, list):
        raise TypeError
    prompt.images.extend(pb.ImageSource(uri=uri) for uri in value)

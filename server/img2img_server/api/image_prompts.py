"""The image prompts of a request: checked, before their images are read."""

import math

from img2img.v1 import image_to_image_pb2 as pb

from img2img_server.api.loras import MAX_SCALE
from img2img_server.errors import InvalidField
from img2img_server.sources.reading import Sources

MOST_PROMPTS = 4
MOST_IMAGES = 8
"""Maximum number of images of one image prompt."""


def check_image_prompts(message: pb.TransformRequest, sources: Sources) -> None:
    """Checks the fields of a message's image prompts, at most MOST_PROMPTS (request_fields.py), without reading images. Raises
    InvalidField, or NotSupported for images that cannot be read."""
    for index, prompt in enumerate(message.image_prompts):
        field = f"image_prompts[{index}]"
        if not prompt.adapter:
            raise InvalidField(f"{field}.adapter", "no image adapter is named: set one of the model's image_adapters")
        if not prompt.images:
            raise InvalidField(f"{field}.images", "there is no image: send at least one")
        if len(prompt.images) > MOST_IMAGES:
            raise InvalidField(f"{field}.images", f"there are {len(prompt.images)}, the maximum is {MOST_IMAGES}")
        for number, image in enumerate(prompt.images):
            sources.check(image, f"{field}.images[{number}]")
        scale = scale_of(prompt)
        if not (math.isfinite(scale) and abs(scale) <= MAX_SCALE):
            raise InvalidField(f"{field}.scale", f"{scale:g} is not in {-MAX_SCALE:g} to {MAX_SCALE:g}")


def scale_of(prompt: pb.ImagePrompt) -> float:
    """The scale of an image prompt, with its default."""
    return prompt.scale if prompt.HasField("scale") else 1.0

"""The scales of a request's LoRAs, controls and image prompts: factors of their effect."""

import math

from img2img.v1 import image_to_image_pb2 as pb

from img2img_server.errors import InvalidField

MAX_SCALE = 10.0
Scaled = pb.Lora | pb.Control | pb.ImagePrompt


def scale_of(message: Scaled) -> float:
    """The scale of a message, 1 by default."""
    return message.scale if message.HasField("scale") else 1.0


def check_scale(message: Scaled, field: str) -> None:
    """Raises InvalidField for a scale out of bounds of the message in `field`."""
    scale = scale_of(message)
    if not (math.isfinite(scale) and abs(scale) <= MAX_SCALE):
        raise InvalidField(f"{field}.scale", f"{scale:g} is not in {-MAX_SCALE:g} to {MAX_SCALE:g}")

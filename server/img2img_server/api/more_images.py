"""The images of a request besides its source.

Reference images are checked, read and decoded like the source, with bounds for all of them together. The mask's fields are
checked by the model, and make the rule for its pixels.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from img2img.v1 import image_to_image_pb2 as pb
from PIL import Image

from img2img_server.api.image_files import ImageFiles
from img2img_server.api.request_fields import RequestFields
from img2img_server.codecs.jobs import LoadReference
from img2img_server.codecs.pool import Codecs
from img2img_server.errors import InvalidField
from img2img_server.images import ImageLimits, MaskRule
from img2img_server.sources.reading import Sources
from img2img_server.support.source_rule import MaskUse

_FIELD = "reference_images"


@dataclass(frozen=True, slots=True)
class ReferenceImage:
    """A reference image as its model gets it, in RGB, and the digest of its content."""

    image: Image.Image
    digest: bytes


class References:
    """Reads the reference images of requests. All fetched images share the `seconds` of one image, by `clock`."""

    def __init__(
        self,
        sources: Sources,
        codecs: Codecs,
        limits: ImageLimits,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sources, self._codecs, self._limits, self._seconds, self._clock = sources, codecs, limits, seconds, clock

    def check(self, sources: Sequence[pb.ImageSource]) -> None:
        """Checks the references without reading them. Raises InvalidField, or NotSupported for sources that cannot be read."""
        for index, source in enumerate(sources):
            self._sources.check(source, f"{_FIELD}[{index}]")

    async def read(self, sources: Sequence[pb.ImageSource]) -> tuple[ReferenceImage, ...]:
        """Reads and decodes the references one after the other, so that only one file is in memory.

        Raises InvalidField, naming the reference or the field for bounds of all, or an error of reading sources and images.
        """
        found: list[ReferenceImage] = []
        files = ImageFiles(_FIELD, self._sources, self._codecs.memory, self._limits, self._seconds, self._clock)
        for index, source in enumerate(sources):
            async with files.open(source, f"{_FIELD}[{index}]") as (field, data):
                load = LoadReference(field, self._limits, files.pixels_left)
                image, digest, (width, height) = await self._codecs.load_reference(data, load)
            files.pixels_left -= width * height
            found.append(ReferenceImage(image, digest))
        return tuple(found)


def mask_rule(message: pb.TransformRequest, fields: RequestFields, use: MaskUse, model: str, by_alpha: bool) -> MaskRule | None:
    """How the message's mask is prepared for the model, or None if the message has no mask. `fields` are the model's request
    fields, and `use` says whether it takes a mask.

    With `by_alpha` the mask's transparent areas are redrawn. Raises InvalidField for a mask that the model cannot use, a missing
    mask that it needs, and settings without a mask.
    """
    if not message.HasField("mask"):
        _check_no_settings(message)
        if use == "required":
            raise InvalidField("mask", f"model '{model}' is an inpainting model, which needs a mask: white is redrawn")
        return None
    if use == "none":
        raise InvalidField("mask", f"model '{model}' does not take a mask: leave mask unset, or use another model")
    return MaskRule(fields.number(message, "mask_blur"), message.mask_invert, by_alpha)


def _check_no_settings(message: pb.TransformRequest) -> None:
    """Raises InvalidField for a setting of the mask that would have no effect. Defaults are accepted."""
    changed = {
        "mask_blur": message.mask_blur != 0,
        "mask_invert": message.mask_invert,
        "mask_paste": message.HasField("mask_paste") and not message.mask_paste,
    }
    for field, is_set in changed.items():
        if is_set:
            raise InvalidField(field, "it has no effect without a mask: set mask, too")

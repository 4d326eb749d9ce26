"""Sizes of images: what a server takes, and what it makes of it."""

from dataclasses import dataclass

from PIL import Image

from img2img_server.errors import InvalidField
from img2img_server.settings.setting import setting


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """The largest source file in bytes, the largest source and the largest result in pixels."""

    max_bytes: int = setting(16 * 2**20, "largest source file", metavar="BYTES", name="max_image_bytes", least=1)
    max_source_pixels: int = setting(32_000_000, "largest source picture, width x height", metavar="N", least=1)
    max_pixels: int = setting(2048 * 2048, "largest result, width x height", metavar="N", least=1)


def target_size(
    source: tuple[int, int], width: int | None, height: int | None, multiple: int, limits: ImageLimits
) -> tuple[int, int]:
    """The size of the result: what was asked, else the source's, rounded down to the model's multiple, in pixels.

    Raises InvalidField if that is too large or nothing.
    """
    sizes = []
    for field, asked, own in (("width", width, source[0]), ("height", height, source[1])):
        wanted = own if asked is None else asked
        if wanted < multiple:
            name = "image" if asked is None else field
            raise InvalidField(name, f"{field} is {wanted} pixels, the least for this model is {multiple}")
        sizes.append(wanted - wanted % multiple)
    if sizes[0] * sizes[1] > limits.max_pixels:
        name = "image" if width is None and height is None else "width" if width is not None else "height"
        raise InvalidField(
            name,
            f"the result would have {sizes[0]} x {sizes[1]} pixels, the most is {limits.max_pixels}: "
            "set width and height for a smaller one",
        )
    return sizes[0], sizes[1]


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes as diffusers' VaeImageProcessor does (Lanczos, stretched), so that it finds nothing left to do."""
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)

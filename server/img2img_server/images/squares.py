"""The squares of images that CLIP's image encoder reads, as transformers' CLIPImageProcessor makes them."""

from PIL import Image

_LONGEST = 64
"""The largest ratio of an image's sides that is resized. The ends of longer images are cut off first, to bound memory."""


def centered_square(image: Image.Image, side: int) -> Image.Image:
    """The middle of an RGB image, [side, side]: the shorter side is resized to it (bicubic), and the ends of the longer one are
    cut off."""
    image = _bounded(image)
    width, height = image.size
    short, long = min(width, height), max(width, height)
    longer = int(side * long / short)
    size = (side, longer) if width <= height else (longer, side)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    return _middle(resized, side, side)


def _bounded(image: Image.Image) -> Image.Image:
    longest = _LONGEST * min(image.size)
    width, height = (min(side, longest) for side in image.size)
    return _middle(image, width, height)


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))

"""The squares of images that CLIP's image encoder reads, as transformers' CLIPImageProcessor makes them."""

from PIL import Image

_LONGEST = 64
"""The largest ratio of an image's sides that is resized. The ends of longer images are cut off first, to bound memory."""


def centered_square(image: Image.Image, side: int) -> Image.Image:
    """The middle of an RGB image, [side, side]: the shorter side is resized to it (bicubic), and the ends of the longer one are
    cut off."""
    resized = _middle(image, *_bounded(image.size)).resize(size_before_cut(image.size, side), Image.Resampling.BICUBIC)
    return _middle(resized, side, side)


def size_before_cut(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The size that an image of that size is resized to before its ends are cut off."""
    width, height = _bounded(size)
    longer = int(side * max(width, height) / min(width, height))
    return (side, longer) if width <= height else (longer, side)


def _bounded(size: tuple[int, int]) -> tuple[int, int]:
    width, height = size
    longest = _LONGEST * min(size)
    return min(width, longest), min(height, longest)


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))

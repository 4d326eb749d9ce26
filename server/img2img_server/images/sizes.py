"""Limits of image sizes, the rules that determine a result's size, and sources resized as the model gets them."""

import math
from dataclasses import dataclass

from PIL import Image

from img2img_server.errors import InvalidField
from img2img_server.settings.setting import setting
from img2img_server.support.source_rule import SourceRule

_MOST_RATIO = 64
"""The largest ratio of an image's sides that `centered_square` resizes. The ends of longer images are cut off first, to bound
memory."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """The maximum source file in bytes, and the maximum source and result in pixels."""

    max_bytes: int = setting(16 * 2**20, "maximum size of a source file", metavar="BYTES", name="max_image_bytes", least=1)
    max_source_pixels: int = setting(32_000_000, "maximum pixels of a source image, width x height", metavar="N", least=1)
    max_pixels: int = setting(2048 * 2048, "maximum pixels of a result, width x height", metavar="N", least=1)


@dataclass(frozen=True, slots=True)
class SizeRule:
    """A request's rule for the result's size, in pixels: `width` and `height` (None: the source's), or a fit of the source by its
    `longest_side` or `area`."""

    width: int | None = None
    height: int | None = None
    longest_side: int | None = None
    area: int | None = None


def least_size(rule: SizeRule, multiple: int, limits: ImageLimits) -> tuple[int, int]:
    """The smallest result of any source. Raises InvalidField if no source could satisfy the rule."""
    return target_size((multiple, multiple) if rule.longest_side is None else (rule.longest_side, 1), rule, multiple, limits)


def target_size(source: tuple[int, int], rule: SizeRule, multiple: int, limits: ImageLimits) -> tuple[int, int]:
    """The size of the result, in pixels: the rule's or the source's, rounded down to the model's multiple.

    A fit keeps the source's aspect ratio, except for that rounding. Raises InvalidField if the result is too large or too small.
    """
    if rule.longest_side is not None:
        return _by_side(source, rule.longest_side, multiple, limits)
    if rule.area is not None:
        return _by_area(source, min(rule.area, limits.max_pixels), multiple)
    sizes = []
    for field, asked, own in (("width", rule.width, source[0]), ("height", rule.height, source[1])):
        wanted = own if asked is None else asked
        if wanted < multiple:
            name = "image" if asked is None else field
            raise InvalidField(name, f"{field} is {wanted} pixels, the minimum for this model is {multiple}")
        sizes.append(wanted - wanted % multiple)
    width, height = sizes
    name = "width" if rule.width is not None else "height" if rule.height is not None else "image"
    cure = "set fit, which reduces a large image and keeps its aspect ratio, or width and height"
    _check_area((width, height), name, cure if name == "image" else "reduce both, or set fit instead of them", limits)
    return width, height


def _by_side(source: tuple[int, int], longest: int, multiple: int, limits: ImageLimits) -> tuple[int, int]:
    field = "fit.longest_side"
    if longest < multiple:
        raise InvalidField(field, f"the longest side is {longest} pixels, the minimum for this model is {multiple}")
    width, height = (_rounded(longest * side // max(source), multiple) for side in source)
    _check_area((width, height), field, "reduce it", limits)
    return width, height


def _by_area(source: tuple[int, int], area: int, multiple: int) -> tuple[int, int]:
    """The largest size with the source's aspect ratio and at most `area` pixels."""
    width, height = (_rounded(math.isqrt(area * side // other), multiple) for side, other in (source, source[::-1]))
    # If one side is rounded up to one multiple, the other must be smaller than the aspect ratio implies.
    return min(width, _rounded(area // height, multiple)), min(height, _rounded(area // width, multiple))


def _rounded(side: int, multiple: int) -> int:
    return max(side - side % multiple, multiple)


def _check_area(size: tuple[int, int], field: str, cure: str, limits: ImageLimits) -> None:
    if size[0] * size[1] > limits.max_pixels:
        raise InvalidField(
            field, f"the result would have {size[0]} x {size[1]} pixels, the maximum is {limits.max_pixels}: {cure}"
        )


def result_size(
    source: tuple[int, int],
    asked: SizeRule,
    model: SourceRule,
    multiple: int,
    limits: ImageLimits,
    sized_by: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """The size of the result, in pixels: as target_size has it, or the model's own if it sets the size. Sides that are not asked
    for are the source's; of a model that edits, those that it derives from the source, or from an image that is `sized_by`.

    Raises InvalidField for a size that the model does not make of this source.
    """
    size = model.own_size(source)
    if size is None:
        if model.edit_size is not None and asked.longest_side is None and asked.area is None:
            source = model.edit_size.of(sized_by or source)
        size = target_size(source, asked, multiple, limits)
        if model.square and size[0] != size[1]:
            field = "width" if asked.width is not None else "height" if asked.height is not None else "image"
            raise InvalidField(
                field,
                f"the result would have {size[0]} x {size[1]} pixels, and this model makes square images: set width and height",
            )
        return size
    width, height = size
    for field, wanted, made in (
        ("width", asked.width, width),
        ("height", asked.height, height),
        ("fit.longest_side", asked.longest_side, max(size)),
    ):
        if wanted is not None and wanted != made:
            raise InvalidField(
                field, f"this model sets the size itself: of this image it makes {width} x {height} pixels; leave {field} unset"
            )
    _check_area(size, "image", "this model sets the size itself, so this server cannot serve this image", limits)
    return size


def prepare(image: Image.Image, size: tuple[int, int], model: SourceRule, limits: ImageLimits) -> Image.Image:
    """The source as the model gets it for a result of `size`: stretched to that size as the model's image processor does it, so
    that this finds nothing left to do; or as it is if the model wants that, but with no more pixels than a result may have."""
    if model.keeps_size:
        size = image.size if image.width * image.height <= limits.max_pixels else _by_area(image.size, limits.max_pixels, 1)
    if image.size == size:
        return image
    return image.resize(size, Image.Resampling[model.resampling], reducing_gap=model.reducing_gap)


def centered_square(image: Image.Image, side: int) -> Image.Image:
    """The middle of an RGB image, [side, side], as transformers' CLIPImageProcessor makes it: the shorter side is resized to
    `side` (bicubic), and the ends of the longer one are cut off."""
    resized = _middle(image, *_bounded(image.size)).resize(size_before_cut(image.size, side), Image.Resampling.BICUBIC)
    return _middle(resized, side, side)


def size_before_cut(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The size that an image of that size is resized to before its ends are cut off."""
    width, height = _bounded(size)
    longer = int(side * max(width, height) / min(width, height))
    return (side, longer) if width <= height else (longer, side)


def _bounded(size: tuple[int, int]) -> tuple[int, int]:
    width, height = size
    longest = _MOST_RATIO * min(size)
    return min(width, longest), min(height, longest)


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))

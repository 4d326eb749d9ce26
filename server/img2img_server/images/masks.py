"""Masks: gray images that say which part of a source to redraw, and pasting a result into its source by one."""

from dataclasses import dataclass

from PIL import Image, ImageFilter, ImageOps

MAX_BLUR = 1000.0
"""Maximum blur of a mask, in pixels."""


@dataclass(frozen=True, slots=True)
class MaskRule:
    """How a mask is prepared for a model: `invert` swaps black and white, `blur` softens its edges by so many pixels of the mask.
    With `by_alpha` its transparent areas are redrawn, whatever their color, as in OpenAI's API."""

    blur: float = 0.0
    invert: bool = False
    by_alpha: bool = False


def prepare_mask(values: Image.Image, rule: MaskRule, size: tuple[int, int]) -> Image.Image:
    """The mask in mode L at `size`, by the rule: white is redrawn. `values` are its gray values, or its opacity if the rule is
    `by_alpha`, in mode L. In the order of diffusers, whose pipelines resize a mask that their caller has blurred."""
    mask = values if rule.invert == rule.by_alpha else ImageOps.invert(values)
    if rule.blur:
        mask = mask.filter(ImageFilter.GaussianBlur(rule.blur))
    return mask if mask.size == size else mask.resize(size, Image.Resampling.LANCZOS)


def paste(image: Image.Image, source: Image.Image, mask: Image.Image) -> Image.Image:
    """`image` where `mask` is white, `source` where it is black, and a blend where it is gray. A source of another size than the
    image and the mask is resized to theirs.

    The arithmetic is that of diffusers' VaeImageProcessor.apply_overlay.
    """
    if source.size != image.size:  # models that edit get sources at their own size
        source = source.resize(image.size, Image.Resampling.LANCZOS)
    kept = Image.new("RGBa", source.size)
    kept.paste(source.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    pasted = image.convert("RGBA")
    pasted.alpha_composite(kept.convert("RGBA"))
    return pasted.convert("RGB")

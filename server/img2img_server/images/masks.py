"""Masks: gray images that say which part of a source to redraw, and pasting a result into its source by one."""

from dataclasses import dataclass

from PIL import Image, ImageFilter, ImageOps

from img2img_server.errors import InvalidField

MAX_BLUR = 1000.0
"""Maximum blur of a mask, in pixels."""


@dataclass(frozen=True, slots=True)
class MaskRule:
    """What becomes of a mask before a model gets it: `invert` swaps black and white, `blur` softens its edges by so many pixels
    of the mask. With `by_alpha` its transparent areas are redrawn, whatever their color, as in OpenAI's API."""

    blur: float = 0.0
    invert: bool = False
    by_alpha: bool = False


def prepare_mask(
    colors: Image.Image, alpha: Image.Image | None, rule: MaskRule, size: tuple[int, int], field: str
) -> Image.Image:
    """The mask in mode L at `size`, by the rule: white is redrawn. In the order of diffusers, whose pipelines resize a mask that
    their caller has blurred.

    `colors` is RGB, `alpha` its transparency, None if it has none. Raises InvalidField, naming `field`, if a mask that is given
    by its transparency has none.
    """
    if rule.by_alpha:
        if alpha is None:
            raise InvalidField(field, "the mask has no transparency: make the area to redraw transparent, in a PNG or WebP file")
        mask = ImageOps.invert(alpha)
    else:
        mask = colors.convert("L")
    if rule.invert:
        mask = ImageOps.invert(mask)
    if rule.blur:
        mask = mask.filter(ImageFilter.GaussianBlur(rule.blur))
    return mask if mask.size == size else mask.resize(size, Image.Resampling.LANCZOS)


def paste(image: Image.Image, source: Image.Image, mask: Image.Image) -> Image.Image:
    """`image` where `mask` is white, `source` where it is black, and a blend where it is gray. All have one size.

    The arithmetic is that of diffusers' VaeImageProcessor.apply_overlay.
    """
    kept = Image.new("RGBa", source.size)
    kept.paste(source.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    pasted = image.convert("RGBA")
    pasted.alpha_composite(kept.convert("RGBA"))
    return pasted.convert("RGB")

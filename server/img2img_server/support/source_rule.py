"""How a source image is prepared for a model, and how the model determines the size of its results."""

import math
from dataclasses import dataclass
from typing import Literal

Size = tuple[int, int]
"""Width and height in pixels."""

MaskUse = Literal["none", "optional", "required"]
"""Whether a model takes a mask that says which part of the source to redraw."""

_IF_MULTIPLE, _AREA_MULTIPLE, _EDIT_MULTIPLE = 8, 16, 32


@dataclass(frozen=True, slots=True)
class EditSize:
    """The size that a model that edits gives a result unless the request sets it, by the size of an image: its source, or with
    `by_last` the last of its reference images.

    It is about `area` pixels in the image's aspect ratio, with sides that are multiples of 32; with `capped`, the image's own
    size up to that area; or the one of the `preferred` sizes with the closest aspect ratio.
    """

    area: int = 1024 * 1024
    capped: bool = False
    preferred: tuple[Size, ...] = ()
    by_last: bool = False

    def of(self, image: Size) -> Size:
        """The size for an image of that size, in pixels, before it is rounded down to the model's multiple."""
        width, height = image
        if self.preferred:
            return min((abs(width / height - one[0] / one[1]), one) for one in self.preferred)[1]
        if self.capped:
            scale = min(1.0, math.sqrt(self.area / (width * height)))
            return int(width * scale), int(height * scale)
        side = math.sqrt(self.area * (width / height))
        return _rounded(side), _rounded(side / (width / height))


@dataclass(frozen=True, slots=True)
class SourceRule:
    """How a source image is prepared for the model. It is resized to the result's size with `resampling`, the name of a filter of
    Pillow, and `reducing_gap` as Pillow's `resize` has it. With `keeps_size` it stays as large as it is: the model looks at it at
    a size of its own.

    A `square` model makes square images only.

    A model with a `shorter_side` or an `area` also sets the size of its results, by the source's aspect alone. `shorter_side` is
    that side in pixels, as DeepFloyd IF has it; `area` is about so many pixels, as LongCat-Image-Edit has it.

    `edit_size` is the size of its results if requests do not set it, None for the source's.

    `mask` says whether it takes a mask.
    """

    resampling: str = "LANCZOS"
    reducing_gap: float | None = None
    keeps_size: bool = False
    square: bool = False
    shorter_side: int | None = None
    area: int | None = None
    edit_size: EditSize | None = None
    mask: MaskUse = "none"

    @property
    def sets_size(self) -> bool:
        """Whether the model sets the size of its results."""
        return self.shorter_side is not None or self.area is not None

    def own_size(self, source: Size) -> Size | None:
        """The size that the model makes of a source of that size; None if requests set it."""
        aspect = source[0] / source[1]
        if self.shorter_side is not None:
            side = self.shorter_side
            longer = int(round(side / _IF_MULTIPLE * max(aspect, 1 / aspect)) * _IF_MULTIPLE)
            return (longer, side) if aspect >= 1 else (side, longer)
        if self.area is not None:
            width = math.sqrt(self.area * aspect)
            return _rounded_up(width), _rounded_up(width / aspect)
        return None


STRETCHED = SourceRule()
"""The rule of most models: the source at the result's size, resized with Lanczos."""

EDITED = SourceRule(keeps_size=True)
"""The rule of models that edit: images at their own size."""


def _rounded(side: float) -> int:
    return round(side / _EDIT_MULTIPLE) * _EDIT_MULTIPLE


def _rounded_up(side: float) -> int:
    return int(side if side % _AREA_MULTIPLE == 0 else (side // _AREA_MULTIPLE + 1) * _AREA_MULTIPLE)

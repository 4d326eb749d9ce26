"""How a model takes its source image, and what it says of the size of its results."""

import math
from dataclasses import dataclass
from typing import Literal

Size = tuple[int, int]
"""Width and height in pixels."""

MaskUse = Literal["none", "optional", "required"]
"""Whether a model takes a mask that says which part of the source to redraw."""

_IF_MULTIPLE, _AREA_MULTIPLE = 8, 16


@dataclass(frozen=True, slots=True)
class SourceRule:
    """What becomes of a source image before the model gets it.

    It is resized to the result's size with `resampling`, the name of a filter of Pillow, and `reducing_gap` as Pillow's `resize`
    has it. With `keeps_size` it stays as large as it is: the model looks at it at a size of its own.

    A `square` model makes square images only.

    A model with a `shorter_side` or an `area` also sets the size of its results, by the source's aspect alone. `shorter_side`
    is that side in pixels, as DeepFloyd IF has it; `area` is about so many pixels, as LongCat-Image-Edit has it.

    `mask` says whether it takes a mask.
    """

    resampling: str = "LANCZOS"
    reducing_gap: float | None = None
    keeps_size: bool = False
    square: bool = False
    shorter_side: int | None = None
    area: int | None = None
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
"""What most models want: the source at the result's size, resized with Lanczos."""


def _rounded_up(side: float) -> int:
    return int(side if side % _AREA_MULTIPLE == 0 else (side // _AREA_MULTIPLE + 1) * _AREA_MULTIPLE)

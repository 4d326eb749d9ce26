"""How far a graph, and an image drawn with it, may be from PyTorch in fp32: one set of limits for each precision."""

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "fp16", "bf16", "int8"]
"""Of a graph's weights, and of what is computed with them."""

LEAST_CONTRAST = 2.0
"""Standard deviation, in steps of 1/255, below which an image is taken for black or constant: what NaNs decode to."""


@dataclass(frozen=True, slots=True)
class AccuracyLimits:
    """`relative_error` is the greatest L2 norm of a graph's difference over that of the reference, `worst` the greatest single
    difference over the root mean square of the reference. `max_abs_error` (in steps of 1/255), `psnr_db` and `ssim` are a
    finished image's."""

    relative_error: float
    worst: float
    max_abs_error: int
    psnr_db: float
    ssim: float


LIMITS: dict[Precision, AccuracyLimits] = {
    # Both sides are fp32 (epsilon 6e-8) and differ in the order of their sums only. That grows to some 1e-6 through hundreds of
    # layers, while the faults that an export makes (a frozen size, one timestep for all, a lost cast) show at 1e-2 and more.
    # An image's value may then round to the neighbouring one, no further.
    "fp32": AccuracyLimits(1e-4, 1e-3, 1, 50.0, 0.999),
    "fp16": AccuracyLimits(1e-2, 0.1, 255, 35.0, 0.98),
    "bf16": AccuracyLimits(5e-2, 0.5, 255, 25.0, 0.90),
    "int8": AccuracyLimits(1e-1, 1.0, 255, 22.0, 0.85),
}

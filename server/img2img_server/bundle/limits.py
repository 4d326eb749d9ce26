"""Limits of the difference between a graph, and images drawn with it, and PyTorch in fp32, for each precision."""

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "fp16", "bf16", "int8"]
"""Precision of a graph's weights and computation."""

LEAST_CONTRAST = 2.0
"""Minimum standard deviation of an image, in steps of 1/255. Images below are constant or black, as NaNs decode to."""


@dataclass(frozen=True, slots=True)
class AccuracyLimits:
    """Limits of one precision.

    Of a graph's outputs: `relative_error` is the L2 norm of the difference divided by that of the reference, `worst` the largest
    single difference divided by the root mean square of the reference. Of a finished image: `max_abs_error` in steps of 1/255,
    and the minima `psnr_db` and `ssim`.
    """

    relative_error: float
    worst: float
    max_abs_error: int
    psnr_db: float
    ssim: float


LIMITS: dict[Precision, AccuracyLimits] = {
    # Both sides are fp32 (epsilon 6e-8) and differ only in the order of sums. Through hundreds of layers this grows to about
    # 1e-6, while export faults (a frozen size, one timestep for all, a lost cast) cause 1e-2 and more. A value of the image may
    # then be rounded to the neighboring one.
    "fp32": AccuracyLimits(1e-4, 1e-3, 1, 50.0, 0.999),
    "fp16": AccuracyLimits(1e-2, 0.1, 255, 35.0, 0.98),
    "bf16": AccuracyLimits(5e-2, 0.5, 255, 25.0, 0.90),
    "int8": AccuracyLimits(1e-1, 1.0, 255, 22.0, 0.85),
}

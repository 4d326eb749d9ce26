"""A bundle's speedups: how requests that do not need the exact image skip work, and what that changes, as measured at export.

Part of the manifest. Standard library only.
"""

import math
from dataclasses import dataclass

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Speedup:
    """A way to call the model in fewer steps of a request, and to compute some of these, the light ones, in part.

    With a `skip_period`, the model is called in the first `called_share` of a request's steps (rounded up). After these every
    `skip_period`-th step has no call: the image that the model predicted last is kept. Of the called steps, the first
    `full_share` (rounded up) are full, and of the others every `period`-th, beginning with the first; the rest are light. With
    `keeps_guidance`, a light step takes one row for an image instead of two: it predicts for the prompt only and is guided by the
    difference that the prompt made in the last full step. With `keeps_features`, a light step computes the outer layers of the
    denoiser only, on the features of the last full step.

    The rest was measured on the reference requests, against the images of full steps: `times_faster` in work of the denoiser
    (rows, weighted by `Speedups.light_cost`) and `cpu_times_faster` in CPU
    time of whole requests on the machine of the export (0: not measured), both as means; the
    worst and the mean PSNR (in decibels, 999 for equal images) and SSIM.
    """

    name: str
    full_share: float
    period: int
    keeps_guidance: bool
    keeps_features: bool
    called_share: float = 1.0
    skip_period: int = 0
    times_faster: float = 1.0
    cpu_times_faster: float = 1.0
    psnr_db: float = 0.0
    mean_psnr_db: float = 0.0
    ssim: float = 0.0
    mean_ssim: float = 0.0

    def called_steps(self, count: int) -> tuple[int, ...]:
        """The steps of a request of `count` in which the model is called. The first is among them."""
        start, period = _first(count, self.called_share), self.skip_period or count + 1
        return tuple(step for step in range(count) if step < start or (step - start) % period != period - 1)

    def light_steps(self, count: int) -> tuple[bool, ...]:
        """Which of `count` called steps are light."""
        start = _first(count, self.full_share)
        return tuple(step >= start and (step - start) % self.period != 0 for step in range(count))

    def keeps(self, psnr_db: float, ssim: float) -> bool:
        """Whether its worst image has at least this PSNR and SSIM."""
        return self.psnr_db >= psnr_db and self.ssim >= ssim


def _first(count: int, share: float) -> int:
    """The first `share` of `count` steps, rounded up."""
    return math.ceil(share * count - _ROUNDING)


@dataclass(frozen=True, slots=True)
class Speedups:
    """The speedups of a bundle, the fastest first; none if they were not measured.

    They were measured on `images` requests with the bundle's own scheduler, at least `least_steps` inference steps and a guidance
    scale of at most `most_guidance`. `light_cost` is the cost of a row of the light graph, relative to the whole one's.
    """

    table: tuple[Speedup, ...] = ()
    images: int = 0
    least_steps: int = 0
    most_guidance: float = 0.0
    light_cost: float = 1.0


NONE = Speedups()
"""No speedups."""

LIGHT_NAME = "light.onnx"
"""The light graph of a denoiser, beside the whole one, with which it shares the weights' file."""
FEATURES = "deep_features"
"""The whole graph's second output, which the light graph takes: a UNet's hidden states [R, C, h, w] before its last layer, or the
addition of a transformer's blocks after the first to the image's tokens, [R, N, C]."""

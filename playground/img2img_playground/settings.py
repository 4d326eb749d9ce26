"""The settings on the page, which determine the request and the copied program."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from img2img_client.options import Fit, TransformOptions

DEFAULT_PROMPT = "A beautiful landscape with mountains and a lake at sunset"
"""The contract's default prompt (image_to_image.proto)."""

_PREVIEWS = 12
"""Approximate number of previews per run, whatever the number of steps: each costs some device time."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one transform. None is the server's default: its default model, the model's scheduler, a random seed, and
    for `fit` the size of the source.

    Numbers are sent unchecked: the server validates them, and its error names the field.
    """

    model: str | None = None
    prompt: str = DEFAULT_PROMPT
    negative_prompt: str = ""
    scheduler: str | None = None
    strength: float | None = 0.8
    num_inference_steps: int | None = 25
    guidance_scale: float | None = 7.5
    seed: int | None = None
    fit: "Fit | None" = "native"

    def options(self) -> "TransformOptions":
        """The client's options, without None values."""
        options: TransformOptions = {
            "model": self.model,
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt or None,
            "scheduler": self.scheduler,
            "strength": self.strength,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "fit": self.fit,
        }
        return {name: value for name, value in options.items() if value is not None}  # type: ignore[return-value]

    @property
    def preview_interval(self) -> int:
        """Steps between previews."""
        steps = (self.num_inference_steps or 25) * (self.strength or 0.8)
        return max(1, math.ceil(steps / _PREVIEWS)) if math.isfinite(steps) else 1

"""What a person sets on the page, as a value: from it come the call that is made and the program that is copied."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from img2img_client.options import Fit, TransformOptions

DEFAULT_PROMPT = "A beautiful landscape with mountains and a lake at sunset"
"""The contract's own (image_to_image.proto), so that a person sees what an empty request would do."""

_PREVIEWS = 12
"""About as many are asked for, however many steps there are: an eye follows that, and each costs the device a little."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One transform's settings. None leaves a setting to the server: its default model, the model's scheduler, a drawn seed, and,
    of `fit`, the source's own size.

    Numbers are sent as they are: the server knows its limits, and its error names the field.
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
        """The client's options, without those that are left to the server."""
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
        """Every how many steps to ask for a preview."""
        steps = (self.num_inference_steps or 25) * (self.strength or 0.8)
        return max(1, math.ceil(steps / _PREVIEWS)) if math.isfinite(steps) else 1

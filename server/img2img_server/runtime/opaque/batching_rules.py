"""Which classes of diffusers draw several images in one call, each as it would alone, and what their requests must share."""

from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Any, Literal

from img2img_server.engine.request import Request

_SLOTS = 16


@dataclass(frozen=True, slots=True)
class Rule:
    """How a class draws the images of a call.

    Where guidance is above `guided_above` an image is `guided_rows` rows of the denoiser, else one. `negative` says what becomes
    of requests that come with a negative prompt: they are drawn like the others ("together"), only together with those of
    the same prompt ("by prompt"), or image by image ("alone").
    """

    guided_rows: int = 2
    guided_above: float = 1.0
    negative: Literal["together", "by prompt", "alone"] = "together"

    def rows(self, request: Request) -> int:
        """Rows of the denoiser for each image."""
        return self.guided_rows if request.guidance_scale > self.guided_above else 1

    def settings(self, request: Request, parameters: Collection[str]) -> Hashable | None:
        """What requests must have in common to be drawn by one call of a pipeline that takes these `parameters`.

        None where it draws one image at a time.
        """
        negative = request.negative_prompt is not None and "negative_prompt" in parameters
        if negative and self.negative == "alone":
            return None
        known = [getattr(request, name) for name in ("strength", "guidance_scale") if name in parameters]
        prompt = request.prompt if negative and self.negative == "by prompt" else None
        return (request.image.size, request.num_inference_steps, *known, negative, prompt)


RULES: dict[str, Rule] = {
    "FluxImg2ImgPipeline": Rule(guided_rows=1),
    # It cuts the negative prompts to the length of the longest prompt in the call.
    "Kandinsky3Img2ImgPipeline": Rule(negative="by prompt"),
    # Its prior draws the negative prompts, too, as rows of their own, for which it then has no generators.
    "KandinskyV22Img2ImgCombinedPipeline": Rule(negative="alone"),
    "KolorsImg2ImgPipeline": Rule(),
    "LatentConsistencyModelImg2ImgPipeline": Rule(guided_rows=1),
    # Guided by a negative prompt only; the two predictions are calls of their own.
    "QwenImageImg2ImgPipeline": Rule(guided_rows=1),
    "StableDiffusion3Img2ImgPipeline": Rule(),
    "StableDiffusionImg2ImgPipeline": Rule(),
    "StableDiffusionInstructPix2PixPipeline": Rule(guided_rows=3),
    "StableDiffusionXLImg2ImgPipeline": Rule(),
    "ZImageImg2ImgPipeline": Rule(guided_above=0.0),
}
"""Classes whose images were seen to be the same alone and in a call of several, to 1/255 in float32 (diffusers 0.39,
`tests/server/test_sharing.py`). Every other class draws one image in a call: whether other classes support lists of
images or generators was not tested."""


def rule_of(pipe: Any) -> Rule | None:
    """The rule of a pipeline's class; None where it draws one image at a time."""
    return RULES.get(type(pipe).__name__)


def slot(settings: Hashable) -> int:
    """A number for `settings`, the same for equal ones.

    There are few: the engine keeps what it measured of each for good. Where different settings get the same one, those requests
    are prepared and stepped in one round, but by calls of their own.
    """
    return hash(settings) % _SLOTS

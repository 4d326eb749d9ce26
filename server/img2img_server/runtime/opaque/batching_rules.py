"""Which diffusers classes draw several images per call with the same results, and which requests may share a call."""

from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Any, Literal

from img2img_server.engine.request import Request

_SLOTS = 16


@dataclass(frozen=True, slots=True)
class Rule:
    """How a class draws the images of a call.

    If guidance is above `guided_above`, an image is `guided_rows` rows of the denoiser, else one. `negative` is the rule for
    requests with a negative prompt: they share calls like all others ("together"), only with requests of the same prompt ("by
    prompt"), or are drawn image by image ("alone").
    """

    guided_rows: int = 2
    guided_above: float = 1.0
    negative: Literal["together", "by prompt", "alone"] = "together"

    def rows(self, request: Request) -> int:
        """Rows of the denoiser per image."""
        return self.guided_rows if request.guidance_scale > self.guided_above else 1

    def settings(self, request: Request, parameters: Collection[str]) -> Hashable | None:
        """The settings that requests must have in common to share a call of a pipeline with these `parameters`.

        None if the images are drawn one at a time.
        """
        negative = request.negative_prompt is not None and "negative_prompt" in parameters
        if negative and self.negative == "alone":
            return None
        known = [getattr(request, name) for name in ("strength", "guidance_scale", "true_cfg_scale") if name in parameters]
        prompt = request.prompt if negative and self.negative == "by prompt" else None
        return (request.image.size, request.size, request.num_inference_steps, *known, negative, prompt)


RULES: dict[str, Rule] = {
    "FluxImg2ImgPipeline": Rule(guided_rows=1),
    # It truncates negative prompts to the length of the longest prompt in the call.
    "Kandinsky3Img2ImgPipeline": Rule(negative="by prompt"),
    # Its prior adds rows for negative prompts, for which it has no generators.
    "KandinskyV22Img2ImgCombinedPipeline": Rule(negative="alone"),
    "KolorsImg2ImgPipeline": Rule(),
    "LatentConsistencyModelImg2ImgPipeline": Rule(guided_rows=1),
    # Guided only with a negative prompt; the two predictions are separate calls.
    "QwenImageImg2ImgPipeline": Rule(guided_rows=1),
    "StableDiffusion3Img2ImgPipeline": Rule(),
    "StableDiffusionImg2ImgPipeline": Rule(),
    "StableDiffusionInstructPix2PixPipeline": Rule(guided_rows=3),
    "StableDiffusionXLImg2ImgPipeline": Rule(),
    "ZImageImg2ImgPipeline": Rule(guided_above=0.0),
}
"""Classes whose images are the same alone and in a shared call, to 1/255 in float32 (diffusers 0.39, checked by
`tests/server/test_batching_rules.py`). All other classes, which are not tested, draw one image per call."""


def rule_of(pipe: Any) -> Rule | None:
    """The rule of a pipeline's class; None if it draws one image at a time."""
    return RULES.get(type(pipe).__name__)


def slot(settings: Hashable) -> int:
    """A small number for `settings`, equal for equal settings.

    There are few numbers, because the engine keeps its measurements of each forever. If different settings have the same number,
    their requests are prepared and stepped in one round, but by separate calls.
    """
    return hash(settings) % _SLOTS

"""Which fields of a request a diffusers pipeline takes: those of its call that change its images."""

import inspect
from typing import Any

from img2img_server.runtime.common.pipe import call_parameters
from img2img_server.support.model_fields import FieldRule, ModelFields

DEPENDENT = ("negative_prompt", "strength", "guidance_scale", "true_cfg_scale")
"""Fields that are arguments of the same name, of the classes that have them."""

_EMBEDDED = frozenset(
    {
        "Flux2Pipeline",
        "FluxControlImg2ImgPipeline",
        "FluxImg2ImgPipeline",
        "FluxKontextPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageImg2ImgPipeline",
    }
)
"""Classes whose `guidance_scale` is nothing but an input of the transformer, which only distilled ones have."""

_SEVERAL = frozenset({"Flux2KleinPipeline", "Flux2Pipeline", "QwenImage21Pipeline", "QwenImageEditPlusPipeline"})
"""Classes that take a list of images for one result. In others a list is a batch."""

_DISTILLED_STEPS = 4.0
"""Steps of a pipeline whose configuration says `is_distilled`, as FLUX.2 klein's documentation has it."""


def request_fields(pipe: Any) -> ModelFields:
    """The fields that the pipeline takes, with its own defaults where it has any.

    A pipeline that edits has the guidance that its class has as the default; all others have the server's.
    """
    parameters = call_parameters(pipe)
    ignored = _ignored(pipe)
    fields = {}
    for name in DEPENDENT:
        if name not in parameters or name in ignored:
            continue
        is_own = name == "true_cfg_scale" or (name == "guidance_scale" and "strength" not in parameters)
        fields[name] = FieldRule(parameters[name].default if is_own else None)
    if type(pipe).__name__ in _SEVERAL:
        fields["reference_images"] = FieldRule()
    if pipe.config.get("is_distilled"):
        fields["num_inference_steps"] = FieldRule(_DISTILLED_STEPS)
    return fields


def masked_fields(kind: Any, fields: ModelFields) -> ModelFields:
    """The fields that requests with a mask can set in addition to `fields`, the model's: parameters of diffusers' inpainting
    class `kind`, which sees one reference, or as many as the model without a mask."""
    parameters = inspect.signature(kind.__call__).parameters
    masked = {"strength": FieldRule(parameters["strength"].default, needs="mask")}
    if "image_reference" in parameters and "reference_images" not in fields:
        masked["reference_images"] = FieldRule(needs="mask", max_count=1)
    return masked


def _ignored(pipe: Any) -> set[str]:
    """Arguments without an effect in this pipeline, by its configuration."""
    ignored = set()
    embeds = getattr(getattr(pipe, "transformer", None), "config", {}).get("guidance_embeds", False)
    if (type(pipe).__name__ in _EMBEDDED and not embeds) or pipe.config.get("is_distilled"):
        ignored.add("guidance_scale")
    if getattr(getattr(pipe, "unet", None), "config", {}).get("time_cond_proj_dim") is not None:
        ignored.add("negative_prompt")  # guidance is an input of the UNet
    return ignored

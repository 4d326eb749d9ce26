"""How a pipeline's class treats a source image and a strength."""

import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from img2img_server.engine.request import Request
from img2img_server.errors import InvalidField
from img2img_server.runtime.common.diffusers_import import PIL_INTERPOLATION
from img2img_server.runtime.common.pipe import PIXELS, SQUARE, call_parameters, parts, view_of
from img2img_server.support.source_rule import EditSize, SourceRule

_AREAS = {"LongCatImageEditPipeline": 1024 * 1024}
"""Classes whose results have about so many pixels, whatever is asked for."""

_EDIT_SIZES = {
    "Flux2KleinPipeline": EditSize(capped=True),
    "Flux2Pipeline": EditSize(capped=True),
    "QwenImage21Pipeline": EditSize(by_last=True),
    "QwenImageEditPipeline": EditSize(),
    "QwenImageEditPlusPipeline": EditSize(by_last=True),
}
"""The sizes that classes choose. `_edit_size` has that of FluxKontextPipeline, which makes squares if it is not asked for a size;
Black Forest Labs' own code makes the size that the pipeline gives the source, and so does this server."""


def source_rule(pipe: Any) -> SourceRule:
    """How a source is prepared for the pipeline: as the pipeline's own image processor would.

    A pipeline without a strength that takes a width edits: it looks at the source at a size of its own, and begins from noise.
    One with resolution bins (SANA) makes an image of another size, and resizes that.
    """
    name, parameters = type(pipe).__name__, call_parameters(pipe)
    if name in PIXELS:  # the UNet's size is the results' shorter side
        return SourceRule(keeps_size=True, shorter_side=int(pipe.unet.config.sample_size))
    if name in _AREAS:
        return SourceRule(keeps_size=True, area=_AREAS[name])
    if "use_resolution_binning" in parameters or ("strength" not in parameters and "width" in parameters):
        return SourceRule(keeps_size=True, edit_size=_edit_size(name))
    for part in parts(pipe):
        config = getattr(getattr(part, "image_processor", None), "config", None)
        if (resample := getattr(config, "resample", None)) in PIL_INTERPOLATION:
            filter_name = PIL_INTERPOLATION[resample].name
            return SourceRule(filter_name, getattr(config, "reducing_gap", None), square=name in SQUARE)
    return SourceRule()


def _edit_size(name: str) -> EditSize | None:
    if name == "FluxKontextPipeline":
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

        return EditSize(preferred=tuple(PREFERRED_KONTEXT_RESOLUTIONS))
    return _EDIT_SIZES.get(name)


def check_sources(pipe: Any, request: Request) -> None:
    """Raises InvalidField for an image that the pipeline's image processor refuses: FLUX.2's does small ones."""
    check = getattr(getattr(pipe, "image_processor", None), "check_image_input", None)
    if check is None:
        return
    fields = ["image", *(f"reference_images[{index}]" for index in range(len(request.references)))]
    for field, image in zip(fields, (request.image, *request.references), strict=True):
        try:
            check(image)
        except ValueError as error:
            raise InvalidField(field, f"this model does not take the image: {error}") from None


def check_texts(pipe: Any, texts: Mapping[str, str]) -> None:
    """Raises InvalidField for a text, by the name of its field, with a token that stands for an image of a text encoder that sees
    images: transformers refuses more tokens than images."""
    processor = getattr(pipe, "processor", None) or getattr(pipe, "text_processor", None)
    tokens = [getattr(processor, name, None) for name in ("image_token", "video_token")]
    for field, text in texts.items():
        for token in filter(None, tokens):
            if token in text:
                raise InvalidField(field, f"it contains {token}, which stands for an image that the model sees")


def steps_of(pipe: Any, count: int, strength: float) -> int:
    """How many of `count` steps the pipeline runs at `strength`: by its own get_timesteps, all if it has none."""
    for part in parts(pipe):
        if (rule := getattr(part, "get_timesteps", None)) is not None:
            view = view_of(part, scheduler=SimpleNamespace(timesteps=torch.arange(count), order=1))
            known = {"num_inference_steps": count, "strength": strength, "device": "cpu"}
            _, steps = view.get_timesteps(**{key: known[key] for key in inspect.signature(rule).parameters if key in known})
            return int(steps)
    return count

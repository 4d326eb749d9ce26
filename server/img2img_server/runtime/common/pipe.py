"""diffusers pipelines as objects: inner pipelines, shallow copies, supported and native image sizes.

Classes keep their sizes in different attributes, or not at all.
"""

import inspect
from collections.abc import Mapping
from typing import Any


def view_of(pipe: Any, **parts: Any) -> Any:
    """A shallow copy of `pipe` with other `parts`. Bypasses diffusers' __setattr__, which would register their classes in the
    shared configuration."""
    return view_as(pipe, type(pipe), **parts)


def view_as(pipe: Any, kind: type, **parts: Any) -> Any:
    """A shallow copy of `pipe` as an object of another class, which has the same components, with other `parts`."""
    view: Any = object.__new__(kind)
    view.__dict__.update(pipe.__dict__, **parts)
    return view


SQUARE = frozenset({"KandinskyImg2ImgCombinedPipeline"})
"""Classes of diffusers (seen in 0.42) that make square images only: others fail in `prepare_latents`."""

SWAPPED = frozenset({"KandinskyV22Img2ImgPipeline", "KandinskyV22Img2ImgCombinedPipeline"})
"""Classes of diffusers (as of 0.39) that pass width and height to their image processor in the wrong order."""

_UNFITTED = frozenset({"Kandinsky3UNet", "ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"})
"""UNets and UNet blocks that upsample by exactly 2, so that odd sizes do not fit their skip connections."""

PIXELS = frozenset({"IFImg2ImgPipeline"})
"""Classes that denoise pixels: they have no VAE."""

_MULTIPLES = {"QwenImage21Pipeline": 2, "KandinskyImg2ImgCombinedPipeline": 4}
"""Classes that round sizes to so many times what their image processor rounds to."""

_ASSUMED_SIDE = 512
"""Side in pixels of the images that a pipeline was trained on, if its configuration does not say."""


def call_parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of the call of a pipeline's class in diffusers."""
    known: Mapping[str, inspect.Parameter] | None = getattr(pipe, "call_parameters", None)
    return inspect.signature(pipe.__call__).parameters if known is None else known


def parts(pipe: Any) -> list[Any]:
    """The pipeline and, if it is a combined one, its inner pipelines."""
    return [pipe, *(value for name, value in vars(pipe).items() if name.endswith("_pipe"))]


def size_multiple(pipe: Any) -> int:
    """The number of pixels of which width and height must be multiples: the image processor's factor times the denoiser's, or 64
    if the pipeline has no image processor."""
    for part in parts(pipe):
        processor = getattr(part, "image_processor", None)
        factor = getattr(getattr(processor, "config", None), "vae_scale_factor", None)
        if factor is not None:
            return int(factor) * _denoiser_multiple(part) * _MULTIPLES.get(type(pipe).__name__, 1)
    return 64


def native_sizes(pipe: Any) -> tuple[int, int]:
    """Width and height in pixels of the images that the pipeline was trained on."""
    if type(pipe).__name__ in PIXELS:
        return native_size(pipe.unet.config.sample_size, 1)
    for part in parts(pipe):
        factor = getattr(part, "vae_scale_factor", None)
        config = getattr(getattr(part, "unet", None) or getattr(part, "transformer", None), "config", {})
        latents = getattr(part, "default_sample_size", None) or config.get("sample_size")
        if isinstance(factor, int) and latent_size(latents) is not None:
            return native_size(latents, factor)
    return _ASSUMED_SIDE, _ASSUMED_SIDE


def native_size(sample_size: Any, factor: int) -> tuple[int, int]:
    """Width and height in pixels of a denoiser's `sample_size`, if a latent covers `factor` x `factor` pixels."""
    latents = latent_size(sample_size)
    return (latents[0] * factor, latents[1] * factor) if latents is not None else (_ASSUMED_SIDE, _ASSUMED_SIDE)


def latent_size(sample_size: Any) -> tuple[int, int] | None:
    """Width and height in latents of a configuration's `sample_size`: a number, or [height, width]. None for anything else."""
    numbers = sample_size if isinstance(sample_size, (list, tuple)) else [sample_size]
    try:
        sides = [int(number) for number in numbers]
    except (TypeError, ValueError):
        return None
    if not 1 <= len(sides) <= 2 or min(sides) < 1:
        return None
    return sides[-1], sides[0]


def _denoiser_multiple(pipe: Any) -> int:
    """The number of latents of which each side must be a multiple. Only SD 3's pipelines have a `patch_size`; only Kandinsky's
    UNets do not fit upsampled to downsampled sizes."""
    unet: Any = getattr(pipe, "unet", None)
    if not fits_any_size(unet):
        return int(2 ** (len(unet.config["block_out_channels"]) - 1))
    return int(getattr(pipe, "patch_size", 1))


def fits_any_size(unet: Any) -> bool:
    """Whether a UNet fits upsampled to downsampled sizes, so that it takes latents of any size."""
    config = getattr(unet, "config", {})
    kinds = {config.get("_class_name", type(unet).__name__), *config.get("up_block_types", ())}
    return kinds.isdisjoint(_UNFITTED)

"""diffusers pipelines as objects: their inner pipelines, shallow copies, and the image sizes they take and were trained on.

Each class keeps its sizes in another attribute, or not at all.
"""

import copy
from typing import Any


def view_of(pipe: Any, **parts: Any) -> Any:
    """A shallow copy of `pipe` with other `parts`, set past diffusers' __setattr__, which would note their classes in a
    unused configuration."""
    view = copy.copy(pipe)
    view.__dict__.update(parts)
    return view


SWAPPED = frozenset({"KandinskyV22Img2ImgPipeline", "KandinskyV22Img2ImgCombinedPipeline"})
"""Classes of diffusers (seen in 0.39) that hand width and height to their image processor the wrong way round."""

_UNFITTED = frozenset({"Kandinsky3UNet", "ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"})
"""UNets, and blocks of UNets, that double what they get whatever its size was before it was halved."""

_ASSUMED_SIDE = 512
"""Pixels of a side of the images that a pipeline was trained on, where it doesn't say."""


def parts(pipe: Any) -> list[Any]:
    """The pipeline and the inner pipelines that a combined one hands its work to."""
    return [pipe, *(value for name, value in vars(pipe).items() if name.endswith("_pipe"))]


def size_multiple(pipe: Any) -> int:
    """Width and height must be multiples of this many pixels: what the pipeline's image processor rounds to, else 64, times
    what its denoiser's patches and levels need, where the pipeline leaves that to its caller."""
    for part in parts(pipe):
        processor = getattr(part, "image_processor", None)
        factor = getattr(getattr(processor, "config", None), "vae_scale_factor", None)
        if factor is not None:
            return int(factor) * _denoiser_multiple(part)
    return 64


def native_sizes(pipe: Any) -> tuple[int, int]:
    """Width and height in pixels of the images that the pipeline was trained on."""
    for part in parts(pipe):
        factor = getattr(part, "vae_scale_factor", None)
        config = getattr(getattr(part, "unet", None), "config", {})
        latents = getattr(part, "default_sample_size", None) or config.get("sample_size")
        if isinstance(factor, int) and latent_size(latents) is not None:
            return native_size(latents, factor)
    return _ASSUMED_SIDE, _ASSUMED_SIDE


def native_size(sample_size: Any, factor: int) -> tuple[int, int]:
    """Width and height in pixels of a denoiser's `sample_size`, where a latent stands for `factor` pixels a side."""
    latents = latent_size(sample_size)
    return (latents[0] * factor, latents[1] * factor) if latents is not None else (_ASSUMED_SIDE, _ASSUMED_SIDE)


def latent_size(sample_size: Any) -> tuple[int, int] | None:
    """Width and height in latents of a `sample_size` as configurations have it: a number, or a list [height, width] of them.

    None if it is anything else, such as null.
    """
    numbers = sample_size if isinstance(sample_size, (list, tuple)) else [sample_size]
    try:
        sides = [int(number) for number in numbers]
    except (TypeError, ValueError):
        return None
    if not 1 <= len(sides) <= 2 or min(sides) < 1:
        return None
    return sides[-1], sides[0]


def _denoiser_multiple(pipe: Any) -> int:
    """Latents must be multiples of this. Only SD 3's pipelines have a `patch_size`, and only Kandinsky's UNets don't fit what
    they sample up to what they sampled down."""
    unet = getattr(pipe, "unet", None)
    config = getattr(unet, "config", {})
    kinds = {config.get("_class_name", type(unet).__name__), *config.get("up_block_types", ())}
    if not kinds.isdisjoint(_UNFITTED):
        return int(2 ** (len(config["block_out_channels"]) - 1))
    return int(getattr(pipe, "patch_size", 1))

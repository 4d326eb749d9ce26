"""What sizes a diffusers pipeline takes, and which it was trained on: each class says so in another place, or not at all."""

from typing import Any

SWAPPED = frozenset({"KandinskyV22Img2ImgPipeline", "KandinskyV22Img2ImgCombinedPipeline"})
"""Classes of diffusers (seen in 0.39) that hand width and height to their image processor the wrong way round."""

_UNFITTED = frozenset({"Kandinsky3UNet", "ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"})
"""UNets, and blocks of UNets, that double what they get whatever its size was before it was halved."""

_ASSUMED_SIDE = 512
"""Pixels of a side of the pictures that a pipeline was trained on, where it doesn't say."""


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


def native_side(pipe: Any) -> int:
    """Pixels of a side of the pictures that the pipeline was trained on."""
    for part in parts(pipe):
        factor = getattr(part, "vae_scale_factor", None)
        config = getattr(getattr(part, "unet", None), "config", {})
        side = getattr(part, "default_sample_size", None) or config.get("sample_size")
        if isinstance(factor, int) and isinstance(side, int):
            return side * factor
    return _ASSUMED_SIDE


def _denoiser_multiple(pipe: Any) -> int:
    """Latents must be multiples of this. Only SD 3's pipelines have a `patch_size`, and only Kandinsky's UNets don't fit what
    they sample up to what they sampled down."""
    unet = getattr(pipe, "unet", None)
    config = getattr(unet, "config", {})
    kinds = {config.get("_class_name", type(unet).__name__), *config.get("up_block_types", ())}
    if not kinds.isdisjoint(_UNFITTED):
        return int(2 ** (len(config["block_out_channels"]) - 1))
    return int(getattr(pipe, "patch_size", 1))

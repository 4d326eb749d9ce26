"""Which ControlNets fit which models: both have the same numbers in their configurations, so neither is loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from img2img_server.bundle.controls import FAMILY, FLUX_CLASS
from img2img_server.bundle.files import DAMAGED, add_layers, read_json
from img2img_server.bundle.image_prompts import PROMPTS_ONLY
from img2img_server.bundle.manifest import Manifest
from img2img_server.errors import InvalidField

ControlKind = tuple[tuple[str, Any], ...]
"""The properties that a ControlNet shares with the models that it fits: names and values. Empty if unknown, or if it fits none.
"""

_FLUX = "Flux"
FLUX_PIXELS = 8
"""Pixels of a latent of Flux on each side."""
_FLUX_NUMBERS = ("in_channels", "joint_attention_dim", "pooled_projection_dim")
_UNET = "Stable Diffusion"
_UNET_NUMBERS = ("in_channels", "addition_embed_type", "projection_class_embeddings_input_dim", "addition_time_embed_dim")


def kind_of_net(config: Mapping[str, Any]) -> ControlKind:
    """The kind of a ControlNet with this config.json. Raises KeyError, TypeError or ValueError if it is damaged."""
    if config.get("_class_name") == FLUX_CLASS:
        return _flux(config, FLUX_PIXELS)
    return _unet(config, pixels_of_latent(config))


def pixels_of_latent(config: Mapping[str, Any]) -> int:
    """The pixels of a latent on each side, by the config.json of a ControlNet for a UNet."""
    return int(2 ** (len(config["conditioning_embedding_out_channels"]) - 1))


def kind_of_model(config: Mapping[str, Any], pixels: int) -> ControlKind:
    """The kind of a model whose denoiser has this config.json, and whose latents are of so many pixels on each side. Raises like
    `kind_of_net`."""
    return _flux(config, pixels) if "num_single_layers" in config else _unet(config, pixels)


def check_fit(field: str, name: str, net: ControlKind, model: ControlKind) -> None:
    """Raises InvalidField, naming `field`, if the ControlNet `name` does not fit a model."""
    if problem := _difference(net, model):
        raise InvalidField(field, f"ControlNet '{name}' does not fit this model: {problem}")


def _difference(net: ControlKind, model: ControlKind) -> str:
    (_, family), *numbers = net
    (_, wanted), *others = model
    if family != wanted:
        return f"it is for {family}"
    for (name, own), (_, other) in zip(numbers, others, strict=True):
        if own != other:
            return f"it is for another size: {name} is {_shown(own)} in the ControlNet and {_shown(other)} in the model"
    return ""


def control_kind(bundle: Path, manifest: Manifest) -> ControlKind:
    """The kind of the bundle of a ControlNet, or of a model whose requests may have some. Empty for others, and if it cannot be
    read: loading the bundle says why."""
    try:
        if manifest.family == FAMILY:
            return kind_of_net(read_json(bundle / FAMILY / "config.json"))
        denoiser = next((part.name for part in manifest.components if part.control), None)
        if denoiser is None or manifest.family in PROMPTS_ONLY:
            return ()
        folder = next(bundle / name for name in ("vae_decoder", "vae") if (bundle / name).is_dir())
        pixels = 2 ** (len(read_json(folder / "config.json")["block_out_channels"]) - 1)
        return kind_of_model(read_json(bundle / denoiser / "config.json"), pixels)
    except (*DAMAGED, StopIteration):
        return ()


def _flux(config: Mapping[str, Any], pixels: int) -> ControlKind:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    numbers = [(name, int(config[name])) for name in _FLUX_NUMBERS]
    return ("family", _FLUX), ("pixels of a latent", pixels), *numbers, ("the width of blocks", int(width))


def _unet(config: Mapping[str, Any], pixels: int) -> ControlKind:
    text = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    numbers = [(name, config.get(name)) for name in _UNET_NUMBERS]
    return (
        ("family", _UNET),
        ("pixels of a latent", pixels),
        *numbers,
        ("the width of texts", _hashable(text)),
        ("channels of residuals", _residuals(config)),
    )


def _residuals(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The channels of a UNet's skip connections, and of its middle block."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    counts = [layers] * len(widths) if isinstance(layers, int) else layers
    found: list[Any] = [widths[0]]
    for number, (width, count) in enumerate(zip(widths, counts, strict=True), start=1):
        add_layers(found, width, count + (number < len(widths)))  # with that of the downsampling
    return (*map(int, found), int(widths[-1]))


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)

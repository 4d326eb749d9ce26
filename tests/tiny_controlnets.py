"""Tiny ControlNets with random weights. Their zero convolutions are not zero, as after training."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    FluxControlNetModel,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)

UNION, POOLING, PIXELS = "u", "p", "x"
"""Letters of unions, of ControlNets that pool their residuals, and of those of Flux that read pixels, not latents."""


def build(model: Path, directory: Path, letter: str) -> Path:
    """Saves a ControlNet for the denoiser of the tiny model in `model` into `directory` and returns it. The letter selects its
    variant."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(ord(letter))
        if (model / "transformer").is_dir():
            return _save_flux(FluxTransformer2DModel.from_pretrained(model / "transformer"), directory, letter)
        unet = UNet2DConditionModel.from_pretrained(model / "unet")
        net = _union(unet) if letter == UNION else _plain(unet)
        for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
            torch.nn.init.normal_(layer.weight, std=0.1)
            torch.nn.init.normal_(layer.bias, std=0.05)
        # The image has a visible effect.
        net.controlnet_cond_embedding.conv_out.weight.mul_(20)
        net.register_to_config(global_pool_conditions=letter == POOLING)
        net.eval().save_pretrained(directory, safe_serialization=True)
    return directory


def _plain(unet: Any) -> Any:
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8), load_weights_from_unet=False)


def _union(unet: Any) -> Any:
    known = {name: unet.config[name] for name in ControlNetUnionModel._get_init_keys(ControlNetUnionModel) if name in unet.config}
    width = unet.config.block_out_channels[0]
    net = ControlNetUnionModel(
        **known,
        conditioning_embedding_out_channels=(8, 8, 8, 8),
        num_trans_channel=width,
        num_proj_channel=width,
        num_trans_head=4,
        num_control_type=6,
    )
    torch.nn.init.normal_(net.spatial_ch_projs.weight, std=0.3)
    return net


def _save_flux(transformer: Any, directory: Path, letter: str) -> Path:
    """For "b" with two single blocks, else with one or, if it reads pixels, none."""
    config = {
        name: transformer.config[name]
        for name in FluxControlNetModel._get_init_keys(FluxControlNetModel)
        if name in transformer.config
    }
    config["num_single_layers"] = {"b": 2, PIXELS: 0}.get(letter, 1)
    if letter == UNION:
        config["num_mode"] = 4
    if letter == PIXELS:
        config |= {"patch_size": 2, "conditioning_embedding_channels": transformer.config.in_channels // 4}
    net = FluxControlNetModel(**config)
    for layer in (*net.controlnet_blocks, *net.controlnet_single_blocks):
        torch.nn.init.normal_(layer.weight, std=0.2)
        torch.nn.init.normal_(layer.bias, std=0.1)
    torch.nn.init.normal_(net.controlnet_x_embedder.weight, std=0.5)
    if letter == PIXELS:
        torch.nn.init.normal_(net.input_hint_block.conv_out.weight, std=1)
    net.eval().save_pretrained(directory, safe_serialization=True)
    return directory

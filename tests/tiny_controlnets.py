"""Tiny ControlNets with random weights. Their zero convolutions are not zero, as after training."""

from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

_TIMESTEP = 500


def build(model: Path, directory: Path, seed: int = 0) -> Path:
    """Saves a ControlNet for the UNet of the tiny model in `model` into `directory` and returns it."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel.from_pretrained(model / "unet")
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8), load_weights_from_unet=False)
        for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
            torch.nn.init.normal_(layer.weight, std=0.1)
            torch.nn.init.normal_(layer.bias, std=0.05)
        # What the image says comes through.
        net.controlnet_cond_embedding.conv_out.weight.mul_(20)
        net.eval().save_pretrained(directory, safe_serialization=True)
    return directory

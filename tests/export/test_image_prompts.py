"""The control graph's inputs for image prompts: as diffusers' own IP-Adapters compute them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from img2img_server.bundle.files import read_json
from img2img_server.bundle.image_prompts import TOKEN_COUNTS, filled_up, layer_widths, states_width

Get = Callable[[str], Path]

_SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
}
_REFINER = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (384, 768, 1536, 1536),
    "transformer_layers_per_block": 4,
    "attention_head_dim": [6, 12, 24, 24],
    "cross_attention_dim": 1280,
}
UNETS: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1.5": {"cross_attention_dim": 768},
    "Stable Diffusion 2.1": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20]},
    "SDXL": _SDXL,
    "SDXL's refiner": _REFINER,
    "SSD-1B": _SDXL
    | {
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "other numbers of layers": {"layers_per_block": [1, 2, 3, 1]},
}
"""Settings that differ from diffusers' defaults."""


def loads_as(unet: Any) -> list[int]:
    """The widths of the layers that diffusers replaces, in the order in which it numbers an IP-Adapter's weights."""
    names = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    return [unet.get_submodule(name.removesuffix(".processor")).to_k.out_features for name in names]


@pytest.mark.parametrize("name", UNETS)
def test_layers_of_known_unets_are_those_of_diffusers(name: str) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
    config = {"_class_name": "UNet2DConditionModel", **unet.config}
    assert list(layer_widths(config)) == loads_as(unet)
    assert states_width(layer_widths(config)) == 2 * sum(loads_as(unet))


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "refiner", "lcm", "sd-inpaint"])
def test_layers_of_tiny_unets_are_those_of_diffusers(name: str, tiny_model: Get) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_model(name), subfolder="unet")
    assert list(layer_widths(read_json(tiny_model(name) / "unet" / "config.json"))) == loads_as(unet)
    assert loads_as(unet)


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": "UNet3DConditionModel"},
        {"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 4},
        {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
        {"cross_attention_dim": [320, 640, 1280, 1280]},
        {"only_cross_attention": [False, True, False, False]},
        {"dual_cross_attention": True},
        {"attention_type": "gated"},
        {"encoder_hid_dim_type": "text_proj"},
    ],
)
def test_unets_with_other_attention_take_no_image_prompts(changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        config = {"_class_name": "UNet2DConditionModel", **UNet2DConditionModel().config}
    assert len(layer_widths(config)) == 16
    assert layer_widths(config | changes) == ()


def test_tokens_are_filled_up_to_few_lengths() -> None:
    assert [filled_up(count, TOKEN_COUNTS) for count in (1, 4, 5, 257, 272, 273, 2056)] == [4, 4, 16, 272, 272, 544, 2176]

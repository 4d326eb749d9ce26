"""The control graph's inputs for image prompts: as diffusers' own IP-Adapters compute them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import UNet2DConditionModel
from img2img_export.convert.image_prompts import example_inputs, prompted
from img2img_export.convert.parts import denoiser_part
from img2img_server.bundle.controls import is_residual
from img2img_server.bundle.files import read_json
from img2img_server.bundle.image_prompts import BIAS, PADDING, STATES, TOKEN_COUNTS, filled_up, layer_widths, states_width
from img2img_server.bundle.manifest import read_manifest

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


_EMBEDDING = 24
"""Width of the image encoder's embeddings in the tests."""


def loads_as(unet: Any) -> list[int]:
    """The widths of the layers that diffusers replaces, in the order in which it numbers an IP-Adapter's weights."""
    names = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    return [unet.get_submodule(name.removesuffix(".processor")).to_k.out_features for name in names]


@pytest.mark.parametrize("name", UNETS)
def test_layers_of_known_unets_match_diffusers(name: str) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
    config = {"_class_name": "UNet2DConditionModel", **unet.config}
    assert list(layer_widths(config)) == loads_as(unet)
    assert states_width(layer_widths(config)) == 2 * sum(loads_as(unet))


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "refiner", "lcm", "sd-inpaint"])
def test_layers_of_tiny_unets_match_diffusers(name: str, tiny_model: Get) -> None:
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


def random_adapter(unet: Any, seed: int) -> dict[str, Any]:
    """The weights of an IP-Adapter for a UNet, in the layout of its file."""
    generator = torch.Generator().manual_seed(seed)
    text = unet.config.cross_attention_dim

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).div(shape[-1] ** 0.5)

    layers = {
        f"{2 * index + 1}.to_{kind}_ip.weight": matrix(width, text)
        for index, width in enumerate(loads_as(unet))
        for kind in ("k", "v")
    }
    projection = {"proj.weight": matrix(4 * text, _EMBEDDING), "proj.bias": matrix(4 * text)}
    return {"image_proj": projection | {"norm.weight": 1 + matrix(text), "norm.bias": matrix(text)}, "ip_adapter": layers}


def states_of(adapter: dict[str, Any], tokens: torch.Tensor, scale: float) -> torch.Tensor:
    """The graph's input for tokens [T, D]: in the order of the file, keys beside values."""
    layers = adapter["ip_adapter"]
    return torch.cat([tokens @ weight.T * (scale if "to_v" in name else 1.0) for name, weight in layers.items()], -1)


def inputs_of(control: onnxruntime.InferenceSession, rows: int) -> dict[str, np.ndarray]:
    """Random inputs of a control graph without residuals, which have one place for all, and without image prompts."""
    rng = np.random.default_rng(0)
    shapes = {item.name: [axis for axis in item.shape[1:] if isinstance(axis, int)] for item in control.get_inputs()}
    feed = {name: rng.standard_normal((rows, *shape), np.float32) for name, shape in shapes.items()}
    feed |= {name: np.zeros((rows, *shape, 1, 1), np.float32) for name, shape in shapes.items() if is_residual(name)}
    feed["sample"] = rng.standard_normal((rows, 4, 9, 13), np.float32)
    feed["timestep"] = np.array([900, 500, 3], np.float32)[:rows]
    feed["encoder_hidden_states"] = rng.standard_normal((rows, 77, *shapes["encoder_hidden_states"]), np.float32)
    return feed | {STATES: np.zeros((rows, 1, 1, *shapes[STATES]), np.float32), BIAS: np.zeros((rows, 1, 1), np.float32)}


def in_diffusers(model: Path, adapters: list[dict[str, Any]], scales: list[float], feed: Any, row: int) -> tuple[Any, Any]:
    """The prediction for a row by a UNet into which diffusers loads the adapters, and the tokens of each adapter [T, D]."""
    unet: Any = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    given = {name: torch.from_numpy(value[row : row + 1]) for name, value in feed.items()}
    added: dict[str, Any] = {name: given[name] for name in ("text_embeds", "time_ids") if name in given}
    tokens: list[torch.Tensor] = []
    if adapters:
        unet._load_ip_adapter_weights(adapters)
        for processor in unet.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = scales
        images = [torch.randn(1, 1, _EMBEDDING, generator=torch.Generator().manual_seed(index)) for index in range(2)]
        added["image_embeds"] = images[: len(adapters)]
        with torch.no_grad():
            tokens = [own[0].flatten(0, 1) for own in unet.encoder_hid_proj(added["image_embeds"])]
    with torch.no_grad():
        found = unet(given["sample"], given["timestep"], given["encoder_hidden_states"], added_cond_kwargs=added)
    return found.sample[0].numpy(), tokens


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_image_prompt_rows_match_adapters_loaded_by_diffusers(name: str, bundle: Get, tiny_model: Get) -> None:
    """A row has none, one has one, one has two. Tokens and adapters are filled up."""
    (component,) = (part for part in read_manifest(bundle(name)).components if part.name == "unet")
    assert component.image_prompts
    control = onnxruntime.InferenceSession(bundle(name) / component.control)
    feed = inputs_of(control, 3)
    unet = UNet2DConditionModel.from_pretrained(tiny_model(name), subfolder="unet")
    adapters, scales = [random_adapter(unet, 1), random_adapter(unet, 2)], [0.7, -0.5]
    states = np.zeros((3, 4, 16, feed[STATES].shape[-1]), np.float32)
    bias = np.full((3, 4, 16), PADDING, np.float32)
    expected = []
    for row in range(3):
        drawn, tokens = in_diffusers(tiny_model(name), adapters[:row], scales[:row], feed, row)
        expected.append(drawn)
        for index, own in enumerate(tokens):
            states[row, index, : len(own)] = states_of(adapters[index], own, scales[index])
            bias[row, index, : len(own)] = 0
    bias[0] = 0
    (found,) = control.run(["out_sample"], feed | {STATES: states, BIAS: bias})
    (plain,) = control.run(["out_sample"], feed)
    spread = np.std(expected[0])
    for row in range(3):
        assert np.abs(found[row] - expected[row]).max() < 1e-4 * spread
    assert np.array_equal(found[0], plain[0]), "a row without image prompts has the same result in any company"
    assert min(np.abs(found[row] - plain[row]).max() for row in (1, 2)) > 0.05 * spread


def test_control_graph_of_a_unet_with_other_attention_has_no_image_prompts() -> None:
    config = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = UNet2DConditionModel(**config, block_out_channels=(32,), cross_attention_dim=8, only_cross_attention=True)
    call = {"sample": torch.zeros(1, 4, 8, 8), "timestep": torch.zeros(1), "encoder_hidden_states": torch.zeros(1, 77, 8)}
    part = denoiser_part("unet", unet, [call, call], call)
    assert prompted(part, unet) is part
    assert example_inputs(unet, 2) == {}

"""The models that are checked, by their sizes alone: modules whose parameters take no memory, or have random values.

Stable Diffusion 1.5 in all parts, SDXL's UNet, and a tiny model of each kind, whose widths CUDA's fused operators take.
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from bench_models import BETAS, TOKENIZER, UNETS, text_config, vae_settings
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from gpu_check.random_weights import random_values

_TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (64, 128),  # an even number of channels in each of GroupNorm's 32 groups, in all sums of both
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 64,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_TINY_XL = _TINY | {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64 + 6 * 8,
}
_UNETS = UNETS | {"tiny-sd15": _TINY, "tiny-sdxl": _TINY_XL}
_VAES = {"sd15": (128, 256, 512, 512), "tiny-sd15": (64, 64, 64, 64)}
_TEXTS = {"sd15": (768, 12, 12), "tiny-sd15": (64, 2, 4)}

NAMES = ("tiny-sd15", "sd15", "tiny-sdxl", "sdxl")
"""The models, by name. Those of SDXL have a UNet only."""
WHOLE = tuple(_TEXTS)
"""The models that have all parts of a pipeline."""


def unet(name: str) -> Any:
    """The model's UNet, without memory for its parameters."""
    return _empty(lambda: UNet2DConditionModel(**_UNETS[name]))


def pipeline(name: str) -> Any:
    """The model's image-to-image pipeline, without memory for its parameters. Only for models of WHOLE."""
    text = text_config(*_TEXTS[name], "quick_gelu")
    return StableDiffusionImg2ImgPipeline(
        vae=_empty(lambda: AutoencoderKL(**vae_settings(0.18215, _VAES[name]))),
        text_encoder=_empty(lambda: CLIPTextModel(text)),
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        unet=unet(name),
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def filled(module: Any, device: str, dtype: torch.dtype) -> Any:
    """The module on `device` with the weights that its graphs have."""
    for owner, name, value, path in list(_parameters(module)):
        setattr(owner, name, torch.nn.Parameter(random_values(path, tuple(value.shape)).to(device, dtype), requires_grad=False))
    return module.to(device)


def unet_feed(config: Any, rows: int, side: int) -> dict[str, torch.Tensor]:
    """Random inputs of a UNet with the configuration `config`, by their names in its graph, for images of `side` pixels."""
    generator = torch.Generator().manual_seed(0)
    feed = {
        "sample": torch.randn(rows, config["in_channels"], side // 8, side // 8, generator=generator),
        "timestep": torch.linspace(901.0, 101.0, rows),
        "encoder_hidden_states": torch.randn(rows, 77, config["cross_attention_dim"], generator=generator),
    }
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        feed["text_embeds"] = torch.randn(rows, pooled, generator=generator)
        feed["time_ids"] = torch.tensor([float(side), float(side), 0.0, 0.0, float(side), float(side)]).repeat(rows, 1)
    return feed


def _empty(make: Any) -> Any:
    with init_empty_weights(include_buffers=False):
        return make().eval()


def _parameters(module: Any) -> Iterator[tuple[Any, str, torch.Tensor, str]]:
    for path, value in module.named_parameters():
        owner, _, name = path.rpartition(".")
        yield module.get_submodule(owner), name, value, path

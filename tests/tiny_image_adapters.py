"""Tiny IP-Adapters with random weights, in the layout of h94/IP-Adapter's safetensors, and image prompts that name them."""

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from img2img_export.verify.images import sample_image
from img2img_server.bundle.image_adapters import ImageAdapterFiles
from img2img_server.engine.request import ImagePromptUse
from img2img_server.images.sizes import centered_square
from PIL import Image, ImageOps
from safetensors.torch import save_file
from tiny_image_encoders import SIDE
from transformers import CLIPVisionModelWithProjection

KINDS = ("plain", "plus", "full")
ENCODER = "h"
"""The id of the image encoder that image prompts name."""
TOKENS = 5
"""The number of tokens of a "plus" adapter."""
_WIDTH, _DEPTH = 32, 4
"""The width and depth of its resampler."""


def write_all(folder: Path, model: Path, encoder: Path) -> ImageAdapterFiles:
    """Writes an adapter of each kind into `folder`, for a tiny model and a tiny image encoder of these directories."""
    folder.mkdir(parents=True)
    unet, reader = UNet2DConditionModel.from_pretrained(model / "unet"), CLIPVisionModelWithProjection.from_pretrained(encoder)
    for seed, kind in enumerate(KINDS):
        write(folder / f"{kind}.safetensors", unet, kind, reader, seed)
    return ImageAdapterFiles(folder)


def image_of(letter: str) -> Image.Image:
    """Images "a", "b" and "c", of several sizes."""
    image = sample_image(64, 40)
    return {"a": image, "b": ImageOps.invert(image).rotate(90, expand=True), "c": image.resize((31, 31))}[letter]


def prompt(adapters: ImageAdapterFiles, name: str, letters: str, scale: float) -> ImagePromptUse:
    """An image prompt with the images of these letters, as a request has it."""
    return ImagePromptUse(
        name,
        tuple(centered_square(image_of(letter), SIDE) for letter in letters),
        scale,
        adapters.find(name).digest,
        ENCODER,
        "the encoder's digest",
        tuple(letter.encode() for letter in letters),
    )


def write(
    file: Path, unet: Any, kind: str, encoder: Any, seed: int = 1, strength: float = 3.0, dtype: torch.dtype = torch.float32
) -> Path:
    """Writes an adapter for a diffusers UNet and a transformers image encoder, and returns the file. Its addition to an attention
    is about `strength` times that of weights like the UNet's."""
    save_file({name: tensor.to(dtype) for name, tensor in weights(unet, kind, encoder, seed, strength).items()}, file)
    return file


def weights(unet: Any, kind: str, encoder: Any, seed: int = 1, strength: float = 3.0) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, by name."""
    width = unet.config.cross_attention_dim
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = {"plain": _plain, "plus": _plus, "full": _full}[kind](width, encoder.config)
        made = {f"image_proj.{name}": tensor for name, tensor in parts.items()}
        for index, layer in enumerate(cross_attentions(unet)):
            for part in ("to_k_ip", "to_v_ip"):
                made[f"ip_adapter.{2 * index + 1}.{part}.weight"] = strength * _matrix(layer.inner_dim, width)
    return made


def cross_attentions(unet: Any) -> list[Any]:
    """A UNet's layers to which an adapter adds, in the order of diffusers' processors."""
    return [
        unet.get_submodule(name.removesuffix(".processor")) for name in unet.attn_processors if name.endswith("attn2.processor")
    ]


def _plain(width: int, config: Any) -> dict[str, torch.Tensor]:
    return {**_linear("proj", 4 * width, config.projection_dim), **_norm("norm", width)}


def _full(width: int, config: Any) -> dict[str, torch.Tensor]:
    ins = config.hidden_size
    return {**_linear("proj.0", ins, ins), **_linear("proj.2", width, ins), **_norm("proj.3", width)}


def _plus(width: int, config: Any) -> dict[str, torch.Tensor]:
    made = {"latents": torch.randn(1, TOKENS, _WIDTH)}
    made |= {**_linear("proj_in", _WIDTH, config.hidden_size), **_linear("proj_out", width, _WIDTH), **_norm("norm_out", width)}
    for layer in range(_DEPTH):
        attention, network = f"layers.{layer}.0", f"layers.{layer}.1"
        made |= {**_norm(f"{attention}.norm1", _WIDTH), **_norm(f"{attention}.norm2", _WIDTH), **_norm(f"{network}.0", _WIDTH)}
        made |= {f"{attention}.to_q.weight": _matrix(128, _WIDTH), f"{attention}.to_kv.weight": _matrix(256, _WIDTH)}
        made |= {f"{attention}.to_out.weight": _matrix(_WIDTH, 128)}
        made |= {f"{network}.1.weight": _matrix(4 * _WIDTH, _WIDTH), f"{network}.3.weight": _matrix(_WIDTH, 4 * _WIDTH)}
    return made


def _linear(name: str, outs: int, ins: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": _matrix(outs, ins), f"{name}.bias": 0.2 * torch.randn(outs)}


def _norm(name: str, width: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": 1 + 0.2 * torch.randn(width), f"{name}.bias": 0.2 * torch.randn(width)}


def _matrix(outs: int, ins: int) -> torch.Tensor:
    matrix: torch.Tensor = torch.randn(outs, ins) / ins**0.5
    return matrix

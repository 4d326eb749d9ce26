"""LoRA files with random matrices, for tiny models: with the names of diffusers and of kohya's trainer."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""The matrices (down, up) of each adapted module, by COMPONENT.MODULE."""

TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
    "fc1",
    "fc2",
)
CONVOLUTIONS = ("conv1", "conv_shortcut", "proj_in", "proj_out")


def weights_of(directory: Path) -> Weights:
    return {
        f"{path.parent.name}.{name}": value
        for path in directory.glob("*/*.safetensors")
        for name, value in load_file(path).items()
    }


def make(model: Path, seed: int, targets: tuple[str, ...] = TARGETS, ranks: tuple[int, ...] = (4,)) -> Pairs:
    """Random matrices for all modules of the denoiser and the text encoders that end in `targets`, with `ranks` in turn."""
    generator = torch.Generator().manual_seed(seed)
    pairs: Pairs = {}
    for name, weight in sorted(weights_of(model).items()):
        module, rank = name.removesuffix(".weight"), ranks[len(pairs) % len(ranks)]
        if name.startswith(("unet.", "transformer.", "text_encoder")) and name.endswith(".weight") and module.endswith(targets):
            out, inner = weight.shape[0], weight.shape[1:]
            down = torch.randn(rank, *inner, generator=generator)
            pairs[module] = down, torch.randn(out, rank, *[1] * (len(inner) - 1), generator=generator)
    return pairs


def write_diffusers(pairs: Pairs, path: Path, config: Mapping[str, Any] | None = None) -> Path:
    tensors: Weights = {}
    for module, (down, up) in pairs.items():
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(config)} if config else None)
    return path


def write_kohya_flux(model: Path, seed: int, path: Path, rank: int, factor: float) -> Path:
    """Writes random matrices for a Flux model with the names of kohya's trainer: of Black Forest Labs' modules, in which queries,
    keys and values are one layer. Single blocks are left out: diffusers reads them at Flux' own width only. So are CLIP's
    attention layers, which diffusers ignores in such a file."""
    known = {
        "img_attn_proj": "attn.to_out.0",
        "img_mlp_0": "ff.net.0.proj",
        "img_mlp_2": "ff.net.2",
        "img_mod_lin": "norm1.linear",
    }
    known |= {"txt_attn_proj": "attn.to_add_out", "txt_mlp_0": "ff_context.net.0.proj", "txt_mod_lin": "norm1_context.linear"}
    layers = {f"double_blocks_0_{name}": f"transformer_blocks.0.{module}" for name, module in known.items()}
    layers |= {"single_blocks_1_linear2": "single_transformer_blocks.1.proj_out"}
    layers |= {"single_blocks_1_modulation_lin": "single_transformer_blocks.1.norm.linear"}
    weights, generator = weights_of(model), torch.Generator().manual_seed(seed)
    shapes = {f"lora_unet_{name}": weights[f"transformer.{module}.weight"].shape for name, module in layers.items()}
    width = shapes["lora_unet_double_blocks_0_img_attn_proj"][0]
    shapes |= {f"lora_unet_double_blocks_0_{side}_attn_qkv": torch.Size((3 * width, width)) for side in ("img", "txt")}
    for name, weight in weights.items():
        if name.startswith("text_encoder.") and name.endswith(("fc1.weight", "fc2.weight")):
            shapes[f"lora_te1_{name.removeprefix('text_encoder.').removesuffix('.weight').replace('.', '_')}"] = weight.shape
    tensors: Weights = {}
    for name, (outs, ins) in shapes.items():
        tensors[f"{name}.lora_down.weight"] = factor * torch.randn(rank, ins, generator=generator)
        tensors[f"{name}.lora_up.weight"] = factor * torch.randn(outs, rank, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors, path)
    return path


def write_kohya(pairs: Pairs, path: Path, alpha: Callable[[str], float]) -> Path:
    parts = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
    if any(module.startswith("text_encoder_2.") for module in pairs):
        parts["text_encoder"] = "lora_te1"
    tensors: Weights = {}
    for module, (down, up) in pairs.items():
        component, _, rest = module.partition(".")
        name = f"{parts[component]}_{rest.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha(module))}
    save_file(tensors, path)
    return path

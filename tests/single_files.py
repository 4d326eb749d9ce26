"""Tiny models as single files, with the key names of the original trainers, and their export."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.read.checkpoint import read_layout
from img2img_export.read.source import fill_tree, resolve
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]

_OUTER = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
_VAE_ATTENTION = {"group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out."}
_OPEN_CLIP = {
    "text_model.encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
}


def rename(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def original_unet(weights: Weights, layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The UNet's weights under the names of its first authors, with `layers` in a block."""
    attends = {name.split(".")[1] for name in weights if re.match(r"up_blocks\.\d\.attentions", name)}
    for name, value in weights.items():
        kind, *rest = re.split(r"_blocks\.|_block\.", name, maxsplit=1)
        if not rest or kind not in ("down", "mid", "up"):
            new = rename(name, _OUTER)
        elif kind == "mid":
            part, index, tail = rest[0].split(".", 2)
            tail = rename(tail, _RESNET) if part == "resnets" else tail
            new = f"middle_block.{2 * int(index) if part == 'resnets' else 1}.{tail}"
        else:
            block, part, index, tail = rest[0].split(".", 3)
            at = int(block) * (layers + 1) + (int(index) if part in ("resnets", "attentions") else layers)
            at, side = (at + 1, "input") if kind == "down" else (at, "output")
            slot = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2 if block in attends else 1}[part]
            tail = rename(tail, _RESNET) if part == "resnets" else tail
            tail = tail.replace("conv.", "op.") if part == "downsamplers" else tail
            new = f"{side}_blocks.{at}.{slot}.{tail}"
        yield f"model.diffusion_model.{new}", value


def original_vae(weights: Weights, blocks: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The VAE's weights under their first names, with attention as convolutions."""
    for name, value in weights.items():
        new = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        new = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", new)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", new)
        new = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda match: f"up.{blocks - 1 - int(match[1])}.block.", new)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.", lambda match: f"up.{blocks - 1 - int(match[1])}.upsample.", new)
        new = re.sub(r"mid_block\.resnets\.(\d)\.", lambda match: f"mid.block_{int(match[1]) + 1}.", new)
        if "mid_block.attentions.0." in new:
            new = rename(new.replace("mid_block.attentions.0.", "mid.attn_1."), _VAE_ATTENTION)
            value = value[:, :, None, None] if value.ndim == 2 else value
        yield f"first_stage_model.{new}", value


def original_open_clip(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """A text encoder's weights as OpenCLIP has them: queries, keys and values in one matrix, the projection transposed."""
    for name, value in weights.items():
        if name == "text_projection.weight":
            yield "text_projection", value.T
        elif ".self_attn.q_proj." in name:
            parts = [weights[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            new = rename(name, _OPEN_CLIP).replace("self_attn.q_proj.", "attn.in_proj_")
            yield new, torch.cat(parts)
        elif ".self_attn.k_proj." not in name and ".self_attn.v_proj." not in name:
            yield rename(name, _OPEN_CLIP), value


def load_texts(path: Path) -> Weights:
    """A CLIP text encoder's weights by their full names: transformers 5 saves some without `text_model`."""
    whole = ("text_model.", "text_projection.")
    return {name if name.startswith(whole) else f"text_model.{name}": value for name, value in load_file(path).items()}


def original_texts(model: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The text encoders' weights as Stable Diffusion 1, 2, XL and XL's refiner have them."""
    first, second = model / "text_encoder" / "model.safetensors", model / "text_encoder_2" / "model.safetensors"
    if first.exists() and not second.exists():
        weights = load_texts(first)
        if json.loads((first.parent / "config.json").read_text())["hidden_act"] == "gelu":
            yield from ((f"cond_stage_model.model.{name}", value) for name, value in original_open_clip(weights))
        else:
            yield from ((f"cond_stage_model.transformer.{name}", value) for name, value in weights.items())
        return
    if first.exists():
        yield from ((f"conditioner.embedders.0.transformer.{name}", value) for name, value in load_texts(first).items())
    for name, value in original_open_clip(load_texts(second)):
        yield f"conditioner.embedders.{int(first.exists())}.model.{name}", value


def write_single_file(model: Path, path: Path) -> Path:
    """Writes the weights of a directory in diffusers' layout as one file."""
    layers = json.loads((model / "unet" / "config.json").read_text())["layers_per_block"]
    blocks = len(json.loads((model / "vae" / "config.json").read_text())["block_out_channels"])
    weights = {
        **dict(original_unet(load_file(model / "unet" / "diffusion_pytorch_model.safetensors"), layers)),
        **dict(original_vae(load_file(model / "vae" / "diffusion_pytorch_model.safetensors"), blocks)),
        **dict(original_texts(model)),
    }
    save_file({name: value.contiguous() for name, value in weights.items()}, path)
    return path


def fill(path: Path, directory: Path, **options: str) -> Path:
    wanted = ExportOptions(source=str(path), output=Path("unused"), **options)  # type: ignore[arg-type]
    checkpoint = resolve(wanted, Progress())
    directory.mkdir()
    layout, loras = fill_tree(checkpoint, wanted, directory, Progress())
    assert loras == ()
    assert (
        layout.components == read_layout(json.loads((directory / "model_index.json").read_text(encoding="utf-8-sig"))).components
    )
    return directory


def weights_of(directory: Path) -> dict[str, Weights]:
    return {path.parent.name: load_file(path) for path in directory.glob("*/*.safetensors")}


def assert_equal(found: dict[str, Weights], expected: dict[str, Weights]) -> None:
    assert found.keys() == expected.keys()
    for component, weights in expected.items():
        assert found[component].keys() == weights.keys()
        for name, value in weights.items():
            assert found[component][name].dtype == value.dtype, (component, name)
            assert torch.equal(found[component][name], value), (component, name)

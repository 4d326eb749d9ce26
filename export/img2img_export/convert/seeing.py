"""A text encoder that sees images (Qwen2.5-VL) as two graphs: its vision tower and its language model (runtime/onnx/vision.py).

The tower is its blocks, called in the order of transformers' `forward`. Patches stay in the order in which they come: windows are
gathered for each attention, and filled up to equally many patches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from img2img_server.runtime.onnx.vision import FEATURES, TOWER

from img2img_export.convert.graph_kinds import MASKED, Axes, GraphKind, LanguageModel
from img2img_export.convert.parts import Part, Tensors

CLASSES = ("Qwen2_5_VLForConditionalGeneration",)
"""The classes of text encoders that see images."""
_PATCHES, _WINDOWS = {0: "patches"}, {0: "windows"}


class VisionTower(GraphKind):
    """The tower of one image."""

    EXACT = ("rotary",)

    @property
    def inputs(self) -> Axes:
        """Patches [N, P] and their places."""
        return {
            "pixel_values": _PATCHES, "rotary": _PATCHES, "windows": _WINDOWS, "window_mask": _WINDOWS, "slots": _PATCHES,
        }  # fmt: skip

    @property
    def outputs(self) -> Axes:
        """The features of the image's tokens [M, D]."""
        return {FEATURES: {0: "image_tokens"}}


class SeeingModel(LanguageModel):
    """The language model, whose image tokens are given as features."""

    @property
    def inputs(self) -> Axes:
        """Token ids and a mask [B, T], and the features [M, D] of the image tokens of all rows."""
        text = super().inputs["input_ids"]
        return {"input_ids": text, "attention_mask": text, FEATURES: {0: "image_tokens"}}


def tower_part(module: Any) -> Part:
    """Describes the graph of the vision tower of `module`."""
    kind = VisionTower(module.config)

    def call(encoder: Any, inputs: Tensors) -> Tensors:
        return {FEATURES: _see(encoder.model.visual, **inputs)}

    return Part(TOWER, "text_encoder", kind.inputs, kind.outputs, call, kind)


def language_part(name: str, module: Any, states: Sequence[int]) -> Part:
    """Describes the graph of the language model of `module` with the hidden states `states`."""
    kind = SeeingModel(module.config, states)

    def call(encoder: Any, inputs: Tensors) -> Tensors:
        embeds = _embed(encoder, inputs["input_ids"], inputs[FEATURES])
        settings = {"use_cache": False, "output_hidden_states": True, "return_dict": True}
        found = encoder.base_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **settings)
        return {f"hidden_states.{index}": found.hidden_states[index] for index in states}

    return Part(name, name, kind.inputs, kind.outputs, call, kind)


def _embed(encoder: Any, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """The embeddings [B, T, D] of tokens, those of images from their features."""
    sees = ids == encoder.config.image_token_id
    # Counted as numbers: ONNX Runtime has no cumulative sum of booleans.
    index = torch.cumsum(sees.long().flatten(), 0).reshape(ids.shape) - 1
    return torch.where(sees[..., None], features[index.clamp_min(0)], encoder.get_input_embeddings()(ids))


def _see(
    tower: Any,
    pixel_values: torch.Tensor,
    rotary: torch.Tensor,
    windows: torch.Tensor,
    window_mask: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """The features of an image."""
    embedding = tower.patch_embed
    states = torch.nn.functional.linear(pixel_values.to(embedding.proj.weight.dtype), embedding.proj.weight.flatten(1))
    bias = ((window_mask.to(states.dtype) - 1) * MASKED)[:, None, None]
    for number, block in enumerate(tower.blocks):
        query, key, value = _projected(block.attn, block.norm1(states), rotary)
        if number in tower.fullatt_block_indexes:
            attended = _attend(query[None], key[None], value[None], None, block.attn)[0]
        else:
            attended = _attend(query[windows], key[windows], value[windows], bias, block.attn).flatten(0, 1)[slots]
        states = states + block.attn.proj(attended)
        states = states + block.mlp(block.norm2(states))
    found: torch.Tensor = tower.merger(states)
    return found


def _projected(attn: Any, states: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys, both rotated, and values: [N, heads, D]."""
    query, key, value = attn.qkv(states).unflatten(1, (3, attn.num_heads, attn.head_dim)).unbind(1)
    cos, sin = rotary[:, None, 0], rotary[:, None, 1]

    def rotated(part: torch.Tensor) -> torch.Tensor:
        first, second = part.float().chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(part.dtype)

    return rotated(query), rotated(key), value


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, attn: Any) -> torch.Tensor:
    """Attention of [W, S, heads, D] within each of W windows: [W, S, heads * D]."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    states = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=attn.scaling)
    return states.transpose(1, 2).flatten(2)

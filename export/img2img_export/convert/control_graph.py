"""ControlNets of UNets: the graph of one, and the control graph of a UNet, to whose skip connections it adds their residuals.

As in diffusers, the residuals are inputs of the UNet. Rows without a ControlNet have zeros, so they share a call with others.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from diffusers.models.controlnets.controlnet_union import ResidualAttentionBlock
from img2img_server.bundle.controls import DOWN, FAMILY, IMAGE, MID, MODE, SCALE, UNION_CLASS, residual_names

from img2img_export.convert.graph_kinds import Axes, GraphKind
from img2img_export.convert.parts import Part, Tensors

_ADDED = ("text_embeds", "time_ids")
"""SDXL's inputs besides the texts."""


class ControlNet(GraphKind):
    """A ControlNet of Stable Diffusion 1, 2 and XL, alone or a union."""

    @property
    def inputs(self) -> Axes:
        """Latents [B, C, h, w], timesteps [B], text [B, T, D], SDXL's embeddings, control images [B, 3, H, W], for a union
        their kinds [B], scales [B]."""
        rows = {0: "batch_size"}
        names: Axes = {
            "sample": {**rows, 2: "height", 3: "width"},
            "timestep": {0: "timestep_batch"},
            "encoder_hidden_states": {**rows, 1: "sequence_length"},
        }
        if self._config.addition_embed_type == "text_time":
            names |= dict.fromkeys(_ADDED, rows)
        names[IMAGE] = {**rows, 2: "image_height", 3: "image_width"}
        return names | ({MODE: rows} if is_union(self._config) else {}) | {SCALE: rows}

    @property
    def outputs(self) -> Axes:
        """The residuals."""
        blocks, layers = len(self._config.down_block_types), self._config.layers_per_block
        # One before the down blocks, one for each of their layers and downsamplers (the last has none), one for the middle.
        count = 2 + (blocks - 1) + (blocks * layers if isinstance(layers, int) else sum(layers))
        return {name: _varying(name) for name in residual_names(count)}


def is_union(config: Any) -> bool:
    """Whether a ControlNet of this configuration reads images of several kinds, which its calls name."""
    return bool(config.get("_class_name") == UNION_CLASS)


def control_part(module: Any) -> Part:
    """A ControlNet: from the UNet's inputs and control images to the residuals, multiplied by the scales.

    Pooled residuals (global_pool_conditions) get the size of the others here, so rows of both kinds can be added.
    """
    kind = ControlNet(module.config)

    def call(net: Any, tensors: Tensors) -> Tensors:
        added = {name: tensors[name] for name in _ADDED if name in tensors}
        scales = tensors[SCALE][:, None, None, None]
        given: dict[str, Any] = {"controlnet_cond": tensors[IMAGE], "conditioning_scale": scales}
        if is_union(net.config):
            modes = tensors[MODE]
            kinds = torch.nn.functional.one_hot(modes, net.config.num_control_type).to(tensors["sample"].dtype)
            given = {
                "controlnet_cond": [tensors[IMAGE]],
                "conditioning_scale": [scales],
                "control_type": kinds,
                "control_type_idx": [modes],
            }
        text = tensors["encoder_hidden_states"]
        with _unpooled(net), patch.object(ResidualAttentionBlock, "attention", _attend_to_itself):
            down, mid = net(
                tensors["sample"], tensors["timestep"], text, **given, added_cond_kwargs=added or None, return_dict=False
            )
        found = dict(zip(kind.outputs, (*down, mid), strict=True))
        if net.config.global_pool_conditions:
            found = {name: value.mean(dim=(2, 3), keepdim=True).expand_as(value) for name, value in found.items()}
        return found

    return Part(FAMILY, FAMILY, kind.inputs, kind.outputs, call, kind)


def _attend_to_itself(block: Any, x: torch.Tensor) -> torch.Tensor:
    """The attention of a union's features [B, T, D], each to itself.

    diffusers, as the union's authors, calls a layer that takes the first axis for the sequence: features attend to those of the
    batch's other rows. The rows of one image are equal, so the result is that of this function, whatever the batch.
    """
    value, bias = block.attn.in_proj_weight.chunk(3)[2], block.attn.in_proj_bias.chunk(3)[2]
    attended: torch.Tensor = block.attn.out_proj(torch.nn.functional.linear(x, value, bias))
    return attended


@contextlib.contextmanager
def _unpooled(net: Any) -> Iterator[None]:
    """Within the block the ControlNet does not pool its residuals."""
    pools = net.config.global_pool_conditions
    net.register_to_config(global_pool_conditions=False)
    try:
        yield
    finally:
        net.register_to_config(global_pool_conditions=pools)


def controlled(part: Part, count: int) -> Part:
    """A UNet's part with `count` residuals as further inputs."""
    names = residual_names(count)

    def call(unet: Any, tensors: Tensors) -> Tensors:
        own = {name: tensors[name] for name in part.inputs}
        with _adding(unet, [tensors[name] for name in names]):
            return part.call(unet, own)

    return replace(part, inputs={**part.inputs, **{name: _varying(name) for name in names}}, call=call)


def residuals_like(part: Part, module: Any, tensors: Tensors) -> Tensors:
    """Zeros in the shapes of the residuals for a call of a UNet's part, by name."""
    found: list[torch.Tensor] = []
    with contextlib.ExitStack() as stack:
        for layer in (module.conv_in, *module.down_blocks, module.mid_block):
            # A down block returns its output, and the states for the skip connections.
            hook = layer.register_forward_hook(lambda _, given, out: found.extend(out[1] if isinstance(out, tuple) else [out]))
            stack.callback(hook.remove)
        with torch.no_grad():
            part.call(module, tensors)
    return {name: torch.zeros(value.shape) for name, value in zip(residual_names(len(found)), found, strict=True)}


@contextlib.contextmanager
def _adding(unet: Any, residuals: Sequence[torch.Tensor]) -> Iterator[None]:
    """Passes the residuals to calls of the UNet within the block."""

    def add(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        *down, mid = residuals
        return args, {**kwargs, DOWN: tuple(down), MID: mid}

    hook = unet.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _varying(name: str) -> dict[int, str]:
    return {0: "batch_size", 2: f"{name}_height", 3: f"{name}_width"}

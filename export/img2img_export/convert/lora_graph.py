"""The LoRA graph: a component's graph whose layers add a LoRA's low-rank product, with another LoRA in each row of a call.

The matrices are inputs (bundle/adapters.py). Linear layers and 1 x 1 convolutions are adapted. Larger convolutions are not: a
different kernel in each row would need the number of rows in an attribute of the node.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from img2img_server.bundle.adapters import ADAPTERS, INDEX, RANK, AdaptedLayer

from img2img_export.convert.parts import Part, Tensors

_WITHIN = {
    "UNet2DConditionModel": ".attentions.",
    "CLIPTextModel": ".layers.",
    "CLIPTextModelWithProjection": ".layers.",
}
"""By the module's class, the part of the names of layers that LoRAs adapt."""

_EXAMPLE_RANK = 3


def layers_of(module: Any) -> tuple[AdaptedLayer, ...]:
    """The layers of `module` that a LoRA graph adapts; empty if its class has no LoRA graph."""
    within = _WITHIN.get(type(module).__name__)
    if within is None:
        return ()
    found = []
    for name, layer in module.named_modules():
        if within not in f".{name}":
            continue
        if isinstance(layer, torch.nn.Linear):
            found.append(AdaptedLayer(name, False, layer.in_features, layer.out_features))
        elif isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
            found.append(AdaptedLayer(name, True, layer.in_channels, layer.out_channels))
    return tuple(found)


def adapted(part: Part, layers: tuple[AdaptedLayer, ...]) -> Part:
    """The part with the inputs of `layers`. Its `call` adds their products."""
    axes = dict(part.inputs)
    for layer in layers:
        axes[layer.down_input] = {0: ADAPTERS, 1 if layer.is_conv else 2: RANK}
        axes[layer.up_input] = {0: ADAPTERS, 2 if layer.is_conv else 1: RANK}
    axes[INDEX] = {0: "batch_size"}

    def call(module: Any, tensors: Tensors) -> Tensors:
        with _adding(module, layers, tensors):
            return part.call(module, {name: tensors[name] for name in part.inputs})

    return replace(part, inputs=axes, call=call)


def example_inputs(layers: tuple[AdaptedLayer, ...], rows: int) -> Tensors:
    """Inputs to trace with, beside the plain graph's."""
    given: Tensors = {}
    for layer in layers:
        given[layer.down_input] = torch.zeros(layer.down_shape(2, _EXAMPLE_RANK))
        given[layer.up_input] = torch.zeros(layer.up_shape(2, _EXAMPLE_RANK))
    return {**given, INDEX: torch.zeros(rows, dtype=torch.int64)}


@contextlib.contextmanager
def _adding(module: Any, layers: tuple[AdaptedLayer, ...], tensors: Tensors) -> Iterator[None]:
    """Adds each layer's product to its output within the block."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            down, up = (torch.index_select(tensors[name], 0, tensors[INDEX]) for name in (layer.down_input, layer.up_input))

            def add(
                _: Any, given: tuple[torch.Tensor, ...], output: Any, layer: Any = layer, down: Any = down, up: Any = up
            ) -> Any:
                return output + _product(layer, given[0], down, up)

            stack.callback(module.get_submodule(layer.name).register_forward_hook(add).remove)
        yield


def _product(layer: AdaptedLayer, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What the LoRAs of the rows add for the input `x`: [rows, tokens, in], [rows, in], or [rows, in, h, w] of a convolution."""
    if layer.is_conv:
        b, _, h, w = x.shape
        return torch.matmul(up, torch.matmul(down, x.reshape(b, layer.ins, h * w))).reshape(b, layer.outs, h, w)
    if x.ndim == 2:
        return torch.matmul(torch.matmul(x[:, None], down), up)[:, 0]
    return torch.matmul(torch.matmul(x, down), up)

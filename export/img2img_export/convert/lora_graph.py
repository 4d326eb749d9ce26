"""The LoRA graph: a component's graph whose layers add a LoRA's low-rank product, with another LoRA in each row of a call.

The matrices are inputs (bundle/adapters.py). Linear layers and convolutions of 1 x 1 and 3 x 3 are adapted. A convolution with
another kernel in each row would need the number of rows in an attribute of the node; so a 3 x 3 convolution is a product for each
of its nine taps, which a fixed convolution shifts and adds.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from img2img_server.bundle.adapters import ADAPTERS, INDEX, TAPS, AdaptedLayer

from img2img_export.convert.parts import Part, Tensors

_EVERYWHERE = ("",)
_WITHIN: dict[str, tuple[str, ...]] = {
    "UNet2DConditionModel": (".attentions.", ".resnets.", ".downsamplers.", ".upsamplers.", ".conv_in", ".conv_out"),
    "CLIPTextModel": (".layers.",),
    "CLIPTextModelWithProjection": (".layers.",),
    "SD3Transformer2DModel": _EVERYWHERE,
    "FluxTransformer2DModel": _EVERYWHERE,
    "Flux2Transformer2DModel": _EVERYWHERE,
    "QwenImageTransformer2DModel": _EVERYWHERE,
    "ZImageTransformer2DModel": _EVERYWHERE,
}
"""Parts of the names of layers that LoRAs adapt, by the module's class. Trainers adapt all linear layers of transformers."""

_EXAMPLE_RANK, _EXAMPLE_KERNEL_RANK = 3, 2


def layers_of(module: Any) -> tuple[AdaptedLayer, ...]:
    """The layers of `module` that a LoRA graph adapts; empty if its class has no LoRA graph."""
    within = _WITHIN.get(type(module).__name__)
    if within is None:
        return ()
    found = []
    for name, layer in module.named_modules():
        if not any(part in f".{name}" for part in within):
            continue
        if isinstance(layer, torch.nn.Linear):
            found.append(AdaptedLayer(name, False, layer.in_features, layer.out_features))
        elif isinstance(layer, torch.nn.Conv2d) and (taps := _taps(layer)):
            found.append(AdaptedLayer(name, True, layer.in_channels, layer.out_channels, taps))
    return tuple(found)


def _taps(layer: torch.nn.Conv2d) -> int:
    """The size of a convolution's kernel, 0 if a LoRA graph cannot adapt it."""
    if layer.groups != 1 or layer.dilation != (1, 1) or layer.padding_mode != "zeros":
        return 0
    kinds: dict[Any, int] = {((1, 1), (0, 0)): 1, ((3, 3), (1, 1)): TAPS}
    taps = kinds.get((layer.kernel_size, layer.padding), 0)
    return 0 if taps == 1 and layer.stride != (1, 1) else taps


def adapted(part: Part, layers: tuple[AdaptedLayer, ...]) -> Part:
    """The part with the inputs of `layers`. Its `call` adds their products."""
    axes = dict(part.inputs)
    for layer in layers:
        down, up = layer.rank_axes
        axes[layer.down_input] = {0: ADAPTERS, 1 if layer.is_conv else 2: down}
        axes[layer.up_input] = {0: ADAPTERS, 2 if layer.is_conv else 1: up}
    axes[INDEX] = {0: "batch_size"}

    def call(module: Any, tensors: Tensors) -> Tensors:
        with _adding(module, layers, tensors):
            return part.call(module, {name: tensors[name] for name in part.inputs})

    return replace(part, inputs=axes, call=call)


def example_inputs(layers: tuple[AdaptedLayer, ...], rows: int) -> Tensors:
    """Inputs to trace with, beside the plain graph's."""
    given: Tensors = {}
    for layer in layers:
        rank = _EXAMPLE_KERNEL_RANK if layer.taps > 1 else _EXAMPLE_RANK
        given[layer.down_input] = torch.zeros(layer.down_shape(2, rank))
        given[layer.up_input] = torch.zeros(layer.up_shape(2, rank))
    return {**given, INDEX: torch.zeros(rows, dtype=torch.int64)}


@contextlib.contextmanager
def _adding(module: Any, layers: tuple[AdaptedLayer, ...], tensors: Tensors) -> Iterator[None]:
    """Adds each layer's product to its output within the block."""
    is_transformer = _WITHIN[type(module).__name__] is _EVERYWHERE
    with contextlib.ExitStack() as stack:
        for layer in layers:
            down, up = (torch.index_select(tensors[name], 0, tensors[INDEX]) for name in (layer.down_input, layer.up_input))

            def add(
                own: Any, given: tuple[torch.Tensor, ...], output: Any, layer: Any = layer, down: Any = down, up: Any = up
            ) -> Any:
                if layer.taps > 1:
                    return output + _kernel_product(layer, given[0], down, up, own.stride, output.shape)
                if is_transformer:
                    # Not as a sum, which ONNX Runtime would fuse with a LayerNorm after it, unlike in the plain graph: rows
                    # without a LoRA would have other last bits.
                    return output - _product(layer, given[0], down, -up)
                return output + _product(layer, given[0], down, up)

            stack.callback(module.get_submodule(layer.name).register_forward_hook(add).remove)
        yield


def _product(layer: AdaptedLayer, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The addition of the rows' LoRAs to a layer's output for the input `x`: [rows, tokens, in], [rows, in], or [rows, in, h, w]
    of a convolution.

    Some layers get all rows twice, one copy after the other (Qwen-Image's modulations, of two timesteps).
    """
    if (copies := int(x.shape[0]) // int(down.shape[0])) > 1:
        down, up = torch.cat([down] * copies), torch.cat([up] * copies)
    if layer.is_conv:
        b, _, h, w = x.shape
        return torch.matmul(up, torch.matmul(down, x.reshape(b, layer.ins, h * w))).reshape(b, layer.outs, h, w)
    if x.ndim == 2:
        return torch.matmul(torch.matmul(x[:, None], down), up)[:, 0]
    return torch.matmul(torch.matmul(x, down), up)


def _kernel_product(
    layer: AdaptedLayer, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, stride: tuple[int, int], shape: torch.Size
) -> torch.Tensor:
    """The addition of the rows' LoRAs to the output, of `shape`, of a 3 x 3 convolution with its input `x` [rows, in, h, w].

    `down` [rows, rank * 9, in] has a matrix for each tap.
    """
    rows, _, h, w = x.shape
    taps = torch.matmul(down, x.reshape(rows, layer.ins, h * w)).reshape(-1, TAPS, h, w)
    # The kernel takes each tap's product from where that tap lies.
    kernel = torch.eye(TAPS, dtype=x.dtype).reshape(1, TAPS, 3, 3)
    mixed = torch.nn.functional.conv2d(taps, kernel, stride=stride, padding=1)
    return torch.matmul(up, mixed.reshape(rows, -1, shape[2] * shape[3])).reshape(rows, layer.outs, shape[2], shape[3])

"""Quantizes the convolutions and matrix products of an fp32 graph to int8, with scales that were measured (calibration.py).

Convolutions become QLinearConv, whose output is int8, too; matrix products become ONNX Runtime's MatMulIntegerToFloat, including
their bias. Scales are constants, so a sample's result does not depend on the rest of its batch. Weights are quantized when they
are written, one at a time.

These are the operators that ONNX Runtime executes (QOperator). It converts graphs with QuantizeLinear and DequantizeLinear around
operators in fp32 (QDQ) to them, which were as fast.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from onnx import NodeProto, helper

from img2img_export.convert.calibration import GREATEST, Layer, Numbers, Scale, numbers_of, scaled
from img2img_export.convert.external_weights import ExternalWeightsGraph, Weight

_CONTRIB = "com.microsoft"


@dataclass(frozen=True, slots=True)
class Int8(Weight):
    """A layer's weight in int8, with a scale for each output channel: [O, I, h, w], or [I, O] of a linear layer."""

    numbers: Numbers | None = None

    def read(self) -> torch.Tensor:
        """The integers."""
        assert self.numbers is not None, "made by to_static_int8"
        weight = scaled(self.source.detach().float(), self.numbers.value)
        scales = self.numbers.weight_scales.reshape(-1, *[1] * (weight.ndim - 1))
        integers = (weight / scales).round_().clamp_(-GREATEST, GREATEST).to(torch.int8)
        return integers if weight.ndim > 2 else integers.t().contiguous()


def to_static_int8(graph: ExternalWeightsGraph, layers: Mapping[str, tuple[Layer, bool]]) -> ExternalWeightsGraph:
    """The graph with `layers` in int8, each per tensor or per channel (calibration.py). Finds them by their weights."""
    by_weight = {id(layer.module.weight): (layer, per_channel) for layer, per_channel in layers.values()}
    result = graph.copy()
    writer = _Writer(result)
    users: dict[str, list[NodeProto]] = {}
    for node in graph.model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    skipped: set[str] = set()
    for node in graph.model.graph.node:
        weight = graph.weights.get(node.input[1]) if node.op_type in ("Conv", "MatMul") else None
        found = by_weight.get(id(weight.source)) if weight is not None else None
        if node.output[0] in skipped:
            continue
        if found is None:
            writer.nodes.append(node)
        elif node.op_type == "Conv":
            writer.convolution(node, *found)
        else:
            following = users.get(node.output[0], [])
            bias = _bias(following, node.output[0], graph, found[0])
            writer.product(node, *found, bias)
            if bias:
                skipped.add(following[0].output[0])
    del result.model.graph.node[:]
    result.model.graph.node.extend(writer.nodes)
    if not any(item.domain == _CONTRIB for item in result.model.opset_import):
        result.model.opset_import.append(helper.make_opsetid(_CONTRIB, 1))
    result.drop_unused()
    return result


def _bias(following: list[NodeProto], output: str, graph: ExternalWeightsGraph, layer: Layer) -> tuple[str, str] | None:
    """The layer's bias and the sum with it, if the product's only user adds it."""
    if len(following) != 1 or following[0].op_type != "Add" or layer.module.bias is None:
        return None
    (other,) = [name for name in following[0].input if name != output] or [output]
    weight = graph.weights.get(other)
    return (other, following[0].output[0]) if weight is not None and weight.source is layer.module.bias else None


class _Writer:
    """Writes nodes in int8 and their constants into `graph.weights`."""

    def __init__(self, graph: ExternalWeightsGraph) -> None:
        self._weights = graph.weights
        self.nodes: list[NodeProto] = []
        self._quantized: dict[tuple[str, float, int], tuple[str, str, str]] = {}

    def convolution(self, node: NodeProto, layer: Layer, per_channel: bool) -> None:
        """QLinearConv between QuantizeLinear and DequantizeLinear, and multiplications by the factors."""
        numbers = numbers_of(layer, per_channel)
        name, output, result = node.name, node.output[0], numbers.result
        value = self._quantize(node.input[0], numbers.value, name, (1, -1, 1, 1))
        bias = layer.module.bias
        offset = bias.detach().double() if bias is not None else torch.zeros(len(numbers.weight_scales)).double()
        integers = (offset / (numbers.weight_scales.double() * numbers.value.scale)).round().clamp(-(2**31), 2**31 - 1)
        # QLinearConv has one scale for the output; dividing a channel's weights divides the channel.
        scales = numbers.weight_scales if result.factors is None else numbers.weight_scales / result.factors
        scale = self._keep(f"{name}.y_scale", torch.tensor(result.scale))
        zero = self._keep(f"{name}.y_zero", torch.tensor(result.zero, dtype=torch.uint8))
        inputs = [
            *value,
            self._integers(f"{name}.weight", layer, numbers),
            self._keep(f"{name}.weight_scale", scales),
            self._keep(f"{name}.weight_zero", torch.zeros(len(scales), dtype=torch.int8)),
            scale,
            zero,
            self._keep(f"{name}.bias", integers.to(torch.int32)),
        ]
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        self.nodes.append(helper.make_node("QLinearConv", inputs, [f"{output}.integers"], name, **attributes))
        floats = output if result.factors is None else f"{output}.divided"
        self.nodes.append(
            helper.make_node("DequantizeLinear", [f"{output}.integers", scale, zero], [floats], f"{name}/Dequantize")
        )
        if result.factors is not None:
            factors = self._keep(f"{name}.y_factors", result.factors.reshape(1, -1, 1, 1))
            self.nodes.append(helper.make_node("Mul", [floats, factors], [output], f"{name}/Multiply"))

    def product(self, node: NodeProto, layer: Layer, per_channel: bool, bias: tuple[str, str] | None) -> None:
        """MatMulIntegerToFloat of a quantized value, with the bias."""
        numbers, name = numbers_of(layer, per_channel), node.name
        value, scale, zero = self._quantize(node.input[0], numbers.value, name, (-1,))
        weight = self._integers(f"{name}.weight", layer, numbers)
        scales = self._keep(f"{name}.weight_scale", numbers.weight_scales)
        zeros = self._keep(f"{name}.weight_zero", torch.zeros(len(numbers.weight_scales), dtype=torch.int8))
        inputs = [value, weight, scale, scales, zero, zeros, *([bias[0]] if bias else [])]
        output = bias[1] if bias else node.output[0]
        self.nodes.append(helper.make_node("MatMulIntegerToFloat", inputs, [output], name, domain=_CONTRIB))

    def _quantize(self, value: str, how: Scale, name: str, shape: tuple[int, ...]) -> tuple[str, str, str]:
        """The names of the quantized value, its scale and its zero point. Layers with the same input share them."""
        if how.factors is not None:
            inverse = self._keep(f"{name}.inverse_factors", (1 / how.factors).reshape(shape))
            self.nodes.append(helper.make_node("Mul", [value, inverse], [f"{name}.scaled"], f"{name}/Scale"))
            value = f"{name}.scaled"
        key = (value, how.scale, how.zero)
        if key not in self._quantized:
            prefix = f"{value}.{len(self._quantized)}"  # two layers may have measured different scales of one value
            scale = self._keep(f"{prefix}.scale", torch.tensor(how.scale))
            zero = self._keep(f"{prefix}.zero", torch.tensor(how.zero, dtype=torch.uint8))
            self._quantized[key] = (f"{prefix}.uint8", scale, zero)
            self.nodes.append(helper.make_node("QuantizeLinear", [value, scale, zero], [f"{prefix}.uint8"], f"{prefix}/Quantize"))
        return self._quantized[key]

    def _integers(self, name: str, layer: Layer, numbers: Numbers) -> str:
        weight = layer.module.weight
        shape = tuple(weight.shape) if layer.is_convolution else tuple(weight.shape)[::-1]
        self._weights[name] = Int8(weight, torch.int8, shape, numbers=numbers)
        return name

    def _keep(self, name: str, value: torch.Tensor) -> str:
        self._weights[name] = Weight.of(value, value.dtype)
        return name

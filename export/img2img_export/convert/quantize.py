"""Quantizes the matrix products of an fp32 graph to int8, like onnxruntime.quantization.quantize_dynamic.

Weights are symmetric int8 with one scale per output channel; activations are quantized to uint8 at run time
(DynamicQuantizeLinear). The nodes are the same as those of quantize_dynamic, so ONNX Runtime fuses them. That function loads the
whole model into memory and, to infer shapes, writes and reads it again; here a weight is quantized when it is written.

These stay in fp32: convolutions (dynamic quantization makes them slower on a CPU); products of activations; Gemms with only one
row per sample (such as timestep embeddings), except the large ones in a transformer's norms; and SKIPPED.

Activations have one scale per batch: unlike in the other precisions, a sample's result depends on the rest of its batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from onnx import NodeProto, TensorProto, helper

from img2img_export.convert.external_weights import ExternalWeightsGraph, Weight

LEAST_ROWS = 32
"""Products with fewer rows in the matrix stay in fp32: quantizing the operands takes as long as the product."""
SKIPPED = (
    "/text_projection/",
    "/encoder/mid_block/",
    "/decoder/mid_block/",
    "/module/x_embedder/",
    "/module/context_embedder/",
    "/module/proj_out/",
    "/module/norm_out/",
)
"""Parts of the names of products that stay in fp32: one row per prompt; a VAE's attention (small, and close to the pixels); the
first and last layers of a transformer."""
_PARTS = ("quantized", "scale", "zero_point")
_GREATEST = 64
"""255 x 64 x 2 is the maximum that fits the 16-bit sums of x86 processors without VNNI: with 127, the error of the tiny models'
text encoder is 17 % on such a machine. With 64 it is 2.9 % everywhere; with 127 and VNNI it is 2 %."""
_TINY = 1e-30
"""The scale of a channel that is all zeros."""


@dataclass(frozen=True, slots=True)
class Quantized(Weight):
    """A matrix [K, N] in int8, quantized per column when read."""

    def read(self) -> torch.Tensor:
        """The integers."""
        matrix = _values(self)
        return (matrix / _scales(matrix)).round_().to(torch.int8).contiguous()


@dataclass(frozen=True, slots=True)
class Scales(Weight):
    """The scale of each column of a quantized matrix [K, N]: [N]."""

    def read(self) -> torch.Tensor:
        """The scales, in fp32."""
        return _scales(_values(self))


def to_int8(graph: ExternalWeightsGraph, chosen: Callable[[NodeProto, Weight], bool] | None = None) -> ExternalWeightsGraph:
    """Quantizes an fp32 graph; `chosen` decides whether a product with a matrix [K, N] is quantized (default: is_worthwhile)."""
    wanted = chosen or is_worthwhile
    result = graph.copy()
    nodes: list[NodeProto] = []
    integers: set[str] = set()
    for node in graph.model.graph.node:
        matrix = matrix_of(node, graph.weights)
        if matrix is None or not wanted(node, matrix):
            nodes.append(node)
            continue
        value, name = node.input[0], node.input[1]
        if value not in integers:
            integers.add(value)
            nodes.append(helper.make_node("DynamicQuantizeLinear", [value], [f"{value}_{part}" for part in _PARTS]))
        result.weights[f"{name}_quantized"] = Quantized(matrix.source, torch.int8, matrix.shape, matrix.permutation)
        result.weights[f"{name}_scale"] = Scales(matrix.source, torch.float32, matrix.shape[1:], matrix.permutation)
        nodes += _product(node)
    del result.model.graph.node[:]
    result.model.graph.node.extend(nodes)
    result.drop_unused()
    return result


def is_worthwhile(node: NodeProto, matrix: Weight) -> bool:
    """Whether the product is large enough to be faster in int8, and not one that stays in fp32."""
    if node.op_type == "Gemm" and "/norm" not in node.name:
        return False
    return matrix.shape[0] >= LEAST_ROWS and not any(part in node.name for part in SKIPPED)


def matrix_of(node: NodeProto, weights: dict[str, Weight]) -> Weight | None:
    """The constant matrix [K, N] of a plain MatMul or Gemm (with an optional bias), else None."""
    weight = weights.get(node.input[1]) if node.op_type in ("MatMul", "Gemm") else None
    if weight is None or len(weight.shape) != 2 or not weight.dtype.is_floating_point or weight.is_reshaped:
        return None
    if node.op_type == "MatMul":
        return weight
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0 and not attributes.get("transA")
    return weight.transposed((1, 0)) if plain and attributes.get("transB") else None


def _product(node: NodeProto) -> list[NodeProto]:
    """The nodes that compute `node` in integers."""
    value, matrix = node.input[0], node.input[1]
    output, bias = node.output[0], list(node.input[2:])
    product = f"{output}_product" if bias else output
    quantized, scale, zero_point = (f"{value}_{part}" for part in _PARTS)
    integers = [quantized, f"{matrix}_quantized", zero_point]
    nodes = [
        helper.make_node("MatMulInteger", integers, [f"{output}_integer"], f"{node.name}_quant"),
        helper.make_node("Cast", [f"{output}_integer"], [f"{output}_cast"], f"{node.name}_cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [scale, f"{matrix}_scale"], [f"{output}_scale"], f"{node.name}_scales_mul"),
        helper.make_node("Mul", [f"{output}_cast", f"{output}_scale"], [product], f"{node.name}_scale_mul"),
    ]
    return [*nodes, helper.make_node("Add", [product, *bias], [output], f"{node.name}_bias")] if bias else nodes


def _values(weight: Weight) -> torch.Tensor:
    """The matrix [K, N] of `weight`, in fp32."""
    value = weight.source.detach()
    return (value if weight.permutation is None else value.permute(weight.permutation)).float()


def _scales(matrix: torch.Tensor) -> torch.Tensor:
    return (matrix.abs().amax(dim=0) / _GREATEST).clamp_min(_TINY)

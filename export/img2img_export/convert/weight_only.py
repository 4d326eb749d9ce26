"""Stores a graph's matrices in 8 or 4 bits; products still compute in the graph's precision (weight-only quantization).

A MatMul or Gemm with a constant matrix becomes ONNX Runtime's operator MatMulNBits: round to nearest, with a scale and a zero
point for each block of weights in a column, by ONNX Runtime's own kernels (those of onnxruntime.quantization's
MatMulNBitsQuantizer, which needs the whole model in memory). A matrix is quantized when it is written, one at a time.

In fp32 graphs the CPU provider may quantize activations to int8, too (`accuracy_level` 4), with a scale for each block of a row:
1024 x 4096 weights took 0.51 to 0.82 of the time of fp32 (AVX512 with VNNI, blocks of 32 to 128), and without it 1.0 to 1.4.
A row's result does not depend on the others of its batch.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from img2img_server.bundle.manifest import WeightFormat
from img2img_server.runtime.common.weight_only import BITS, WeightOnlyLinear
from onnx import NodeProto, helper
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

from img2img_export.convert.external_weights import TORCH_TYPES, ExternalWeightsGraph, Weight
from img2img_export.convert.fused_attention import DOMAIN
from img2img_export.convert.quantize import is_worthwhile, matrix_of

OPERATOR = "MatMulNBits"
_INT8_ACTIVATIONS = 4
"""The accuracy level at which the CPU provider computes with activations in int8."""
_PARTS = ("quantized", "scales", "zero_points")
_KERNELS = {8: quantize_matmul_8bits, 4: quantize_matmul_4bits}


_LEAST_INPUTS = 16
"""Inputs of a linear layer below which it is not quantized."""
_UNQUANTIZED = {"lm_head", "visual", "vision_tower", "vision_model", "multi_modal_projector"}
"""Modules of transformers' models that are not quantized: the head for logits, which are not computed, and the image encoders
with their projections."""


def quantize_layers(module: torch.nn.Module, weight_format: WeightFormat, group_size: int) -> None:
    """Stores the linear layers of a text encoder of transformers in `weight_format`, in blocks of `group_size` weights, one at a
    time, as the server loads them (runtime/common/weight_only.py)."""
    bits = BITS[weight_format]
    for name, linear in list(module.named_modules()):
        is_large = type(linear) is torch.nn.Linear and linear.in_features >= _LEAST_INPUTS
        if not is_large or not _UNQUANTIZED.isdisjoint(name.split(".")):
            continue
        dtype = linear.weight.dtype
        blocks = _Blocks(Weight.of(linear.weight.detach(), dtype).transposed((1, 0)), bits, group_size)
        made = WeightOnlyLinear(linear.in_features, linear.out_features, bits, group_size, linear.bias is not None, dtype)
        parts = dict(zip(_PARTS, (made.packed, made.scales, made.zero_points), strict=True))
        for part, parameter in parts.items():
            parameter.data.copy_(torch.from_numpy(blocks.take(part)).reshape(parameter.shape))
        if made.bias is not None:
            made.bias.data.copy_(linear.bias)
        module.set_submodule(name, made)


@dataclass(slots=True)
class _Blocks:
    """A matrix [K, N], quantized in blocks of `size` rows. Keeps the result until each part was taken."""

    matrix: Weight
    bits: int
    size: int
    _kept: dict[str, np.ndarray] = field(default_factory=dict)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parts: packed integers, scales, zero points."""
        rows, columns = self.matrix.shape
        count = math.ceil(rows / self.size)
        packed = self.size * self.bits // 8
        return dict(
            zip(
                _PARTS, ((columns, count, packed), (columns * count,), (columns * math.ceil(count * self.bits / 8),)), strict=True
            )
        )

    def take(self, part: str) -> np.ndarray:
        """One part; the others are kept until they are taken."""
        if part not in self._kept:
            self._kept = self._quantize()
        return self._kept.pop(part)

    def _quantize(self) -> dict[str, np.ndarray]:
        source = self.matrix.source.detach()
        values = (source if self.matrix.permutation is None else source.permute(self.matrix.permutation)).float()
        rows, columns = values.shape
        shapes = self.shapes()
        count = shapes["quantized"][1]
        padded = np.zeros((count * self.size, columns), np.float32)
        padded[:rows] = values.numpy()
        packed = np.zeros(shapes["quantized"], np.uint8)
        scales = np.zeros((columns, count), np.float32)
        zero_points = np.zeros((columns, shapes["zero_points"][0] // columns), np.uint8)
        _KERNELS[self.bits](packed, padded, scales, zero_points, self.size, columns, rows, False)
        return dict(zip(_PARTS, (packed, scales.reshape(-1), zero_points.reshape(-1)), strict=True))


@dataclass(frozen=True, slots=True)
class _Part(Weight):
    """A part of a quantized matrix, quantized when read."""

    blocks: _Blocks | None = None
    name: str = ""

    def read(self) -> torch.Tensor:
        """The packed integers, the scales in the matrix's type, or the packed zero points."""
        assert self.blocks is not None, "made by to_weight_only"
        return torch.from_numpy(self.blocks.take(self.name)).to(self.dtype)


def to_weight_only(graph: ExternalWeightsGraph, weight_format: WeightFormat, group_size: int) -> ExternalWeightsGraph:
    """The graph with its large matrices in `weight_format`, in blocks of `group_size` weights (options.GROUP_SIZES)."""
    result = graph.copy()
    nodes: list[NodeProto] = []
    for node in graph.model.graph.node:
        matrix = matrix_of(node, graph.weights)
        if matrix is None or not is_worthwhile(node, matrix):
            nodes.append(node)
            continue
        name, blocks = node.input[1], _Blocks(matrix, BITS[weight_format], group_size)
        kinds = (torch.uint8, matrix.dtype, torch.uint8)
        for (part, shape), kind in zip(blocks.shapes().items(), kinds, strict=True):
            known = result.weights.get(f"{name}_{part}")
            if known is None:
                result.weights[f"{name}_{part}"] = _Part(matrix.source, kind, shape, matrix.permutation, blocks, part)
        nodes += _product(node, matrix, blocks)
        result.model.graph.value_info.append(helper.make_tensor_value_info(_output(node), TORCH_TYPES[matrix.dtype], None))
    del result.model.graph.node[:]
    result.model.graph.node.extend(nodes)
    if not any(item.domain == DOMAIN for item in result.model.opset_import):
        result.model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    result.drop_unused()
    return result


def _output(node: NodeProto) -> str:
    """The name of the product's result, before a Gemm's bias is added."""
    return f"{node.output[0]}_product" if len(node.input) > 2 else str(node.output[0])


def _product(node: NodeProto, matrix: Weight, blocks: _Blocks) -> list[NodeProto]:
    level = _INT8_ACTIVATIONS if matrix.dtype == torch.float32 else 0
    product = helper.make_node(
        OPERATOR,
        [node.input[0], *(f"{node.input[1]}_{part}" for part in _PARTS)],
        [_output(node)],
        f"{node.name}_nbits",
        domain=DOMAIN,
        K=matrix.shape[0],
        N=matrix.shape[1],
        bits=blocks.bits,
        block_size=blocks.size,
        accuracy_level=level,
    )
    if len(node.input) == 2:
        return [product]
    return [product, helper.make_node("Add", [_output(node), node.input[2]], [node.output[0]], f"{node.name}_bias")]

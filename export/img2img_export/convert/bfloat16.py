"""Converts an fp16 graph to bf16, which has the range of fp32 and eight bits of precision.

ONNX Runtime's CPU provider (1.31) has no bf16 arithmetic. It moves such tensors (Cast, Reshape, Concat, Slice, Transpose...) and
has LayerNormalization; for Add, Mul, MatMul, Softmax, Sigmoid, Conv and the rest a session fails to start: "Could not find an
implementation". Unlike for fp16, it inserts no casts; emulation.py runs such a graph on the CPU.

Conv supports bf16 from opset 22 on (as do InstanceNormalization, Sin and Cos), so the graph is raised to opset 22; the operators
used here mean the same as in opset 18. Operators without a bf16 kernel in the CUDA provider compute in fp32 between casts.
GroupNorm, which torch exports as InstanceNormalization, would be slow that way, and the CUDA provider's kernel for it stops at
opset 21: it becomes a LayerNormalization, whose sums are fp32.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from onnx import NodeProto, TensorProto, helper

from img2img_export.convert.emulation import (
    MOVING,
    cast,
    of_type,
    replace_nodes,
    retype_node,
    retype_tensor,
    retype_values,
    value_types,
)
from img2img_export.convert.external_weights import TORCH_TYPES, ExternalWeightsGraph, constants
from img2img_export.convert.fused_attention import OPERATOR

OPSET = 22
_IR_VERSION = 10
"""The oldest IR version with opset 22."""

_COMPUTING = {
    *("Add", "Conv", "Div", "Erf", "Exp", "Gelu", "Gemm", "LayerNormalization", "MatMul", "Mul", "Neg", "Pow", "Relu", "Sigmoid"),
    *("Softmax", "Sqrt", "Sub", "Tanh", OPERATOR),
}
"""Operators that compute in bf16, by opset 22's schemas and by the CUDA provider's kernels (ORT's docs/OperatorKernels.md)."""
_TORCH = {kind: dtype for dtype, kind in TORCH_TYPES.items()}


def to_bfloat16(external: ExternalWeightsGraph) -> ExternalWeightsGraph:
    """Converts a graph traced in fp16 to bf16. The parts it computes in fp32 (the sines of the timestep) stay in fp32."""
    half = of_type(value_types(external), TensorProto.FLOAT16)
    result = external.copy()
    graph = result.model.graph
    result.weights = {
        name: replace(weight, dtype=torch.bfloat16) if weight.dtype == torch.float16 else weight
        for name, weight in result.weights.items()
    }
    retype_values((*graph.input, *graph.output, *graph.value_info), TensorProto.FLOAT16, TensorProto.BFLOAT16)
    for tensor in graph.initializer:
        retype_tensor(tensor, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    known = constants(result.model)
    nodes = [new for node in graph.node for new in _group_norm(node, graph.node, known)]
    for node in nodes:
        retype_node(node, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    replace_nodes(graph, [new for node in nodes for new in _island(node, half)])
    result.drop_unused()
    for entry in result.model.opset_import:
        if not entry.domain:
            entry.version = OPSET
    result.model.ir_version = _IR_VERSION
    return result


def _group_norm(node: NodeProto, nodes: Sequence[NodeProto], known: dict[str, np.ndarray]) -> list[NodeProto]:
    """Rewrites the InstanceNormalization of a GroupNorm ([B, groups, rest], scale 1, no bias) as a LayerNormalization."""
    if node.op_type != "InstanceNormalization" or not all(name in known for name in node.input[1:]):
        return [node]
    before = next((other for other in nodes if node.input[0] in other.output), None)
    shape = known.get(before.input[1]) if before is not None and before.op_type == "Reshape" else None
    if shape is None or len(shape) != 3 or (known[node.input[1]] != 1).any() or known[node.input[2]].any():
        return [node]
    value, name = node.input[0], node.output[0]
    one = helper.make_tensor("one", TensorProto.BFLOAT16, [1], [1.0])
    return [
        helper.make_node("Constant", [], [f"{name}.one"], value=one),
        helper.make_node("Shape", [value], [f"{name}.length"], start=2, end=3),
        # ONNX Runtime requires a scale of the full length.
        helper.make_node("Expand", [f"{name}.one", f"{name}.length"], [f"{name}.scale"]),
        helper.make_node(
            "LayerNormalization", [value, f"{name}.scale"], [name], f"{node.name}.group", axis=2, epsilon=node.attribute[0].f
        ),
    ]


def _island(node: NodeProto, half: set[str]) -> list[NodeProto]:
    """`node`, between casts to and from fp32 if it has no bf16 kernel."""
    narrow = [name for name in (*node.input, *node.output) if name in half]
    if not narrow or node.op_type in MOVING or node.op_type in _COMPUTING:
        return [node]
    names = {name: f"{name}.{node.output[0]}.fp32" for name in narrow}
    before = [cast(name, names[name], TensorProto.FLOAT) for name in dict.fromkeys(node.input) if name in half]
    after = [cast(names[name], name, TensorProto.BFLOAT16) for name in node.output if name in half]
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
    return [*before, node, *after]

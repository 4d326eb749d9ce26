"""Converts an fp16 graph to bf16, which has the range of fp32 and eight bits of precision.

ONNX Runtime's CPU provider (1.31) has no bf16 arithmetic. It moves such tensors (Cast, Reshape, Concat, Slice, Transpose...) and
has LayerNormalization; for Add, Mul, MatMul, Softmax, Sigmoid, Conv and the rest a session fails to start: "Could not find an
implementation". Unlike for fp16, it inserts no casts; emulation.py runs such a graph on the CPU.

Conv supports bf16 from opset 22 on (as do InstanceNormalization, Sin and Cos), so the graph is raised to opset 22; the operators
used here mean the same as in opset 18. Operators without a bf16 kernel in the CUDA provider compute in fp32 between casts.
GroupNorm, which torch exports as InstanceNormalization, would be slow that way, and the CUDA provider's kernel for it stops at
opset 21: it becomes a LayerNormalization, whose sums are fp32.

bf16 differs from fp16 in two ways, as in transformers and diffusers. Values are not clipped to the range of fp16 (T5, Flux): T5's
are greater. And T5's `wo` is not in fp32 (tracing.py): ONNX Runtime would fuse norms of values in fp32 with weights in bf16, for
which the CUDA provider has no kernel. It fuses norms of bf16 values only after a single cast, so equal casts are one.
"""

from collections.abc import Container, Sequence
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

_BOUND_OF_FP16 = torch.finfo(torch.float16).max - 1000
"""The smaller bound of T5, for values that contain an infinity."""
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
    makers = {name: node for node in graph.node for name in node.output}
    unclipped = [_without_clip(node, makers, known, half) for node in graph.node]
    nodes = [new for node in unclipped for new in _group_norm(node, makers, known)]
    for node in nodes:
        retype_node(node, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    nodes = [new for node in nodes for new in _island(node, half)]
    replace_nodes(graph, _with_single_casts(nodes, {output.name for output in graph.output}))
    result.drop_unused()
    for entry in result.model.opset_import:
        if not entry.domain:
            entry.version = OPSET
    result.model.ir_version = _IR_VERSION
    return result


def _without_clip(node: NodeProto, makers: dict[str, NodeProto], known: dict[str, np.ndarray], half: set[str]) -> NodeProto:
    """An Identity in place of a Clip of a value in half precision to the range of fp16."""

    def is_bound(name: str) -> bool:
        if name in known:
            return bool((np.abs(known[name].astype(np.float32)) >= _BOUND_OF_FP16).all())
        kind = makers[name].op_type if name in makers else None
        values = {"Cast": slice(1), "Neg": slice(1), "Where": slice(1, 3)}.get(kind or "")
        return not name or (values is not None and all(is_bound(value) for value in makers[name].input[values]))

    if node.op_type != "Clip" or node.output[0] not in half or not all(is_bound(name) for name in node.input[1:]):
        return node
    return helper.make_node("Identity", node.input[:1], node.output, node.name)


def _with_single_casts(nodes: Sequence[NodeProto], outputs: Container[str]) -> list[NodeProto]:
    """The nodes without a Cast that repeats another one, unless its result is an output of the graph."""
    if any(attribute.HasField("g") or attribute.graphs for node in nodes for attribute in node.attribute):
        return list(nodes)  # a subgraph may read the result of any Cast
    first: dict[tuple[str, int], str] = {}
    same: dict[str, str] = {}
    kept = []
    for node in nodes:
        node.input[:] = [same.get(name, name) for name in node.input]
        if node.op_type == "Cast" and node.output[0] not in outputs:
            kind = next(attribute.i for attribute in node.attribute if attribute.name == "to")
            result = first.setdefault((node.input[0], kind), node.output[0])
            if result != node.output[0]:
                same[node.output[0]] = result
                continue
        kept.append(node)
    return kept


def _group_norm(node: NodeProto, makers: dict[str, NodeProto], known: dict[str, np.ndarray]) -> list[NodeProto]:
    """Rewrites the InstanceNormalization of a GroupNorm ([B, groups, rest], scale 1, no bias) as a LayerNormalization."""
    if node.op_type != "InstanceNormalization" or not all(name in known for name in node.input[1:]):
        return [node]
    before = makers.get(node.input[0])
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

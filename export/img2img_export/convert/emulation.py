"""Emulates on a CPU how a GPU computes a graph in half precision: fp32 arithmetic, rounded after every operator.

ONNX Runtime's CPU provider has no bf16 arithmetic, and computes fp16 graphs mostly in fp32, which hides overflows.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from img2img_export.convert.external_weights import TORCH_TYPES, ExternalWeightsGraph

MOVING = {
    *("Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity"),
    *("Reshape", "ScatterND", "Shape", "Size", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
}
"""Operators that only move values, so their results need no rounding."""
_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_TORCH = {kind: dtype for dtype, kind in TORCH_TYPES.items()}


def emulated(model: ModelProto) -> ModelProto:
    """A graph in fp32 arithmetic that rounds every half-precision result to half precision. Inputs and outputs are fp32.

    `model` is a written graph; its weights stay in their file and are cast when read. A graph without half-precision values is
    returned unchanged.
    """
    types = _inferred(model)
    half = next((kind for kind in _HALVES if kind in types.values()), None)
    if half is None:
        return model
    narrow = of_type(types, half)
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    weights = {item.name for item in graph.initializer} & narrow
    inputs = {value.name: f"{value.name}.rounded" for value in graph.input if value.name in narrow}
    nodes = [node for name, new in inputs.items() for node in _rounding(name, new, half)]
    for node in graph.node:
        nodes += _emulated_node(node, inputs, weights, narrow, half)
    retype_values((*graph.input, *graph.output, *graph.value_info), half, TensorProto.FLOAT)
    replace_nodes(graph, nodes)
    return result


def open_emulated(graph: Path) -> onnxruntime.InferenceSession:
    """Opens a CPU session that emulates the written graph `graph`: fp32 tensors in and out."""
    return open_beside(emulated(onnx.load(str(graph), load_external_data=False)), graph.parent)


def open_beside(model: ModelProto, folder: Path) -> onnxruntime.InferenceSession:
    """Opens a CPU session for a graph in memory whose weights are in a file in `folder`.

    The graph runs without optimizations, which would keep cast weights in memory or fuse operators that must round in between.
    So the session takes little more memory than the file, which is mapped.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.log_severity_level = 4
    if not _quantizes_activations(model):
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _quantizes_activations(model: ModelProto) -> bool:
    """Whether products compute in int8 (weight_only.py), which the CPU provider does for prepacked weights only."""
    return any(item.name == "accuracy_level" and item.i for node in model.graph.node for item in node.attribute)


def _emulated_node(node: NodeProto, inputs: dict[str, str], weights: set[str], narrow: set[str], half: int) -> list[NodeProto]:
    """`node` in fp32: half-precision weights are cast before it, results rounded after it."""
    result = NodeProto()
    result.CopyFrom(node)
    retype_node(result, half, TensorProto.FLOAT)
    names = {name: f"{name}.{node.output[0]}.fp32" for name in node.input if name in weights}
    before = [cast(name, new, TensorProto.FLOAT) for name, new in names.items()]
    result.input[:] = [names.get(name, inputs.get(name, name)) for name in node.input]
    if node.op_type in MOVING - {"Cast"}:
        return [*before, result]
    exact = {name: f"{name}.exact" for name in node.output if name in narrow}
    result.output[:] = [exact.get(name, name) for name in node.output]
    return [*before, result, *(step for name, old in exact.items() for step in _rounding(old, name, half))]


def _rounding(source: str, target: str, half: int) -> list[NodeProto]:
    """Rounds fp32 values to the nearest half-precision number, kept in fp32."""
    return [cast(source, f"{target}.half", half), cast(f"{target}.half", target, TensorProto.FLOAT)]


def value_types(graph: ExternalWeightsGraph) -> dict[str, int]:
    """The element type (of TensorProto) of each value in the graph, including its weights."""
    model = ModelProto()
    model.CopyFrom(graph.model)
    for name, weight in graph.weights.items():
        model.graph.input.append(helper.make_tensor_value_info(name, TORCH_TYPES[weight.dtype], weight.shape))
    return _inferred(model)


def cast(source: str, target: str, kind: int) -> NodeProto:
    """A Cast node from `source` to `target` with the type `kind`."""
    return helper.make_node("Cast", [source], [target], to=kind)


def _inferred(model: ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {item.name: item.data_type for item in graph.initializer}
    types.update((item.name, item.type.tensor_type.elem_type) for item in (*graph.value_info, *graph.input, *graph.output))
    return types


def of_type(types: dict[str, int], kind: int) -> set[str]:
    """The names of the values of type `kind`."""
    return {name for name, found in types.items() if found == kind}


def replace_nodes(graph: GraphProto, nodes: list[NodeProto]) -> None:
    """Replaces the nodes of a graph; the new nodes may include its own."""
    copies = []
    for node in nodes:
        copies.append(NodeProto())
        copies[-1].CopyFrom(node)
    del graph.node[:]
    graph.node.extend(copies)


def retype_values(values: Iterable[ValueInfoProto], old: int, new: int) -> None:
    """Changes the declared type of values from `old` to `new`."""
    for value in values:
        if value.type.tensor_type.elem_type == old:
            value.type.tensor_type.elem_type = new


def retype_node(node: NodeProto, old: int, new: int) -> None:
    """Changes the type in a node's attributes (of a Cast or a constant) from `old` to `new`."""
    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i == old:
            attribute.i = new
        elif attribute.HasField("t"):
            retype_tensor(attribute.t, old, new)


def retype_tensor(tensor: TensorProto, old: int, new: int) -> None:
    """Converts a tensor from type `old` to `new`. Values are rounded, not clamped: -65504 becomes -65536 in bf16."""
    if tensor.data_type != old:
        return
    values = torch.from_numpy(numpy_helper.to_array(tensor).astype(np.float32)).to(_TORCH[new])
    name, dims = tensor.name, list(tensor.dims)
    tensor.Clear()
    bits = values.view(torch.int16) if new == TensorProto.BFLOAT16 else values
    tensor.CopyFrom(TensorProto(name=name, data_type=new, dims=dims, raw_data=bits.numpy().tobytes()))

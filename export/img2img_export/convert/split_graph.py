"""Splits a denoiser's graph in two: the head (the timestep embedding, before the first layer) and the body (everything else).

bfloat16 has eight bits of precision: the angle of a timestep embedding (up to 1000 radians) and the timestep itself are rounded
by up to 2. PyTorch computes both in float32, but an engine that computes whole graphs in bfloat16 (OpenVINO) does not. With a
split graph, the head runs in float32 and its outputs are inputs of the body. Both are stored beside the full graph and share its
weights file.
"""

from pathlib import Path

import onnx
import onnxruntime
from img2img_server.bundle.manifest import BODY_NAME, HEAD_NAME
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from img2img_export.convert.external_weights import GRAPH_NAME

_SEEDS = frozenset({"timestep", "time_ids"})
"""The inputs (times and sizes) that are embedded as sines and cosines."""

_HEAVY = frozenset({"Gemm", "MatMul", "MatMulNBits", "Conv"})
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16})


def split(folder: Path) -> bool:
    """Writes the head and the body beside the graph in `folder`. Returns False if the graph has no such head."""
    model = onnx.load(str(folder / GRAPH_NAME), load_external_data=False)
    timed = _timed(model.graph)
    cut = _cut(model.graph, timed)
    if not cut:
        return False
    head = subgraph(model, [item.name for item in model.graph.input], cut)
    embedding = _specified(head)
    if any(item.type.tensor_type.elem_type not in _FLOATS for item in embedding):
        return False
    del head.graph.output[:]
    head.graph.output.extend(embedding)
    body = subgraph(model, [*(item.name for item in model.graph.input), *cut], [item.name for item in model.graph.output])
    body.graph.input.extend(embedding)
    onnx.save(head, str(folder / HEAD_NAME))
    onnx.save(body, str(folder / BODY_NAME))
    return True


def _specified(head: ModelProto) -> list[ValueInfoProto]:
    """The head's outputs with types and shapes inferred by ONNX Runtime; variable axes have names."""
    session = onnxruntime.InferenceSession(head.SerializeToString(), providers=["CPUExecutionProvider"])
    types = {"tensor(float)": TensorProto.FLOAT, "tensor(float16)": TensorProto.FLOAT16}
    return [
        helper.make_tensor_value_info(
            item.name,
            types.get(item.type, TensorProto.UNDEFINED),
            [size if isinstance(size, int) else f"{item.name}.{axis}" for axis, size in enumerate(item.shape)],
        )
        for item in session.get_outputs()
    ]


def _timed(graph: GraphProto) -> set[str]:
    """The values computed only from the seeds, constants and shapes, without a heavy node."""
    seeds = {item.name for item in graph.input} & _SEEDS
    timed, still = set(seeds), {item.name for item in graph.initializer} | {""}
    for node in graph.node:
        known = timed | still
        if node.op_type == "Shape" or (node.op_type not in _HEAVY and all(name in known for name in node.input)):
            (timed if timed.intersection(node.input) and node.op_type != "Shape" else still).update(node.output)
    return timed


def _cut(graph: GraphProto, timed: set[str]) -> list[str]:
    """The outputs of the head that the body reads; empty if there are no sines or cosines."""
    inside = [node for node in graph.node if timed.intersection(node.output)]
    if not any(node.op_type in ("Sin", "Cos") for node in inside):
        return []
    outside = [node for node in graph.node if not timed.intersection(node.output) and node.op_type != "Shape"]
    made = {name for node in inside for name in node.output}
    return sorted({name for node in outside for name in node.input if name in made})


def subgraph(model: ModelProto, inputs: list[str], outputs: list[str]) -> ModelProto:
    """The subgraph between `inputs` and `outputs`, with the initializers and model inputs that it reads."""
    nodes = _between(model.graph, set(inputs), outputs)
    read = {name for node in nodes for name in node.input}
    made = {name for node in nodes for name in node.output}
    graph = helper.make_graph(
        nodes,
        model.graph.name,
        [item for item in model.graph.input if item.name in read],
        [item for item in model.graph.output if item.name in outputs]
        or [helper.make_empty_tensor_value_info(name) for name in outputs],
        [item for item in model.graph.initializer if item.name in read],
        # The types of contrib operators' results, which onnx cannot infer.
        value_info=[item for item in model.graph.value_info if item.name in made],
    )
    part = helper.make_model(graph, opset_imports=model.opset_import, functions=model.functions)
    part.ir_version = model.ir_version
    return part


def _between(graph: GraphProto, inputs: set[str], outputs: list[str]) -> list[NodeProto]:
    """The nodes that compute `outputs` from `inputs`, in the graph's order."""
    wanted = set(outputs)
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        # Values that are inputs of the subgraph are not computed.
        if wanted.intersection(set(node.output) - inputs):
            kept.append(node)
            wanted.update(node.input)
    kept.reverse()
    return kept

"""Splits a denoiser's graph in two: what becomes of the timestep before the first layer, and everything else.

bfloat16 has eight bits: the angle of a time embedding, up to 1000 radians, is off by up to 2 in it, and a timestep by up to 2.
PyTorch computes both in float32, but an engine that computes whole graphs in bfloat16 (OpenVINO does, but for their tail) does
not. Given in two, the small graph runs in float32, and the large one takes what comes out of it. Both lie beside the whole graph
and share its weights' file.
"""

from pathlib import Path

import onnx
import onnxruntime
from img2img_server.bundle.manifest import BODY_NAME, HEAD_NAME
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from img2img_export.convert.external_weights import GRAPH_NAME

_SEEDS = frozenset({"timestep", "time_ids"})
"""The inputs that are numbers of time and size, and become waves."""

_HEAVY = frozenset({"Gemm", "MatMul", "Conv"})
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16})


def split(folder: Path) -> bool:
    """Writes the two graphs beside the graph in `folder`, where it has such a head. Says whether it has."""
    model = onnx.load(str(folder / GRAPH_NAME), load_external_data=False)
    timed = _timed(model.graph)
    cut = _cut(model.graph, timed)
    if not cut:
        return False
    head = _part(model, [item.name for item in model.graph.input], cut)
    waves = _specified(head)
    if any(item.type.tensor_type.elem_type not in _FLOATS for item in waves):
        return False
    del head.graph.output[:]
    head.graph.output.extend(waves)
    body = _part(model, [*(item.name for item in model.graph.input), *cut], [item.name for item in model.graph.output])
    body.graph.input.extend(waves)
    onnx.save(head, str(folder / HEAD_NAME))
    onnx.save(body, str(folder / BODY_NAME))
    return True


def _specified(head: ModelProto) -> list[ValueInfoProto]:
    """The head's outputs with their types and shapes, as ONNX Runtime infers them; axes that vary are named."""
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
    """The values that are made of the seeds, constants and shapes alone, without a heavy node."""
    seeds = {item.name for item in graph.input} & _SEEDS
    timed, still = set(seeds), {item.name for item in graph.initializer} | {""}
    for node in graph.node:
        known = timed | still
        if node.op_type == "Shape" or (node.op_type not in _HEAVY and all(name in known for name in node.input)):
            (timed if timed.intersection(node.input) and node.op_type != "Shape" else still).update(node.output)
    return timed


def _cut(graph: GraphProto, timed: set[str]) -> list[str]:
    """The values that go from the head into the rest. None where nothing turns into waves."""
    inside = [node for node in graph.node if timed.intersection(node.output)]
    if not any(node.op_type in ("Sin", "Cos") for node in inside):
        return []
    outside = [node for node in graph.node if not timed.intersection(node.output) and node.op_type != "Shape"]
    made = {name for node in inside for name in node.output}
    return sorted({name for node in outside for name in node.input if name in made})


def _part(model: ModelProto, inputs: list[str], outputs: list[str]) -> ModelProto:
    """The nodes between `inputs` and `outputs`, with the initializers and those of the model's inputs that they read."""
    nodes = _between(model.graph, set(inputs), outputs)
    read = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        model.graph.name,
        [item for item in model.graph.input if item.name in read],
        [item for item in model.graph.output if item.name in outputs]
        or [helper.make_empty_tensor_value_info(name) for name in outputs],
        [item for item in model.graph.initializer if item.name in read],
    )
    part = helper.make_model(graph, opset_imports=model.opset_import, functions=model.functions)
    part.ir_version = model.ir_version
    return part


def _between(graph: GraphProto, inputs: set[str], outputs: list[str]) -> list[NodeProto]:
    """In the graph's order, the nodes that `outputs` depend on, from `inputs` on."""
    wanted = set(outputs)
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        # What an input stands for is not computed again.
        if wanted.intersection(set(node.output) - inputs):
            kept.append(node)
            wanted.update(node.input)
    kept.reverse()
    return kept

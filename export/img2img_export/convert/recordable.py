"""Keeps what the CPU would compute out of traced graphs, so that a CUDA session can record a whole call as a CUDA graph.

ONNX Runtime records a graph only if no tensor goes from a CPU node to a GPU node (cuda_execution_provider.cc). Two things that
torch's exporter writes break that: ArgMax of integers, for which the CUDA provider has no kernel; and x[arange(n), index], whose
arange it multiplies with a size on the GPU. A third, attention's scale, is a constant already (graph_kinds.py).
"""

from collections.abc import Mapping, Sequence

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper


def make_recordable(model: ModelProto) -> None:
    """Rewrites the graph's nodes in place; what it computes stays the same, bit for bit.

    ArgMax becomes TopK of one, which the CUDA provider has for integers too: both give the lowest index among equal values.
    Range(a, b, c) * size becomes Range(a * size, b * size, c * size), whose bounds are computed on the host.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "ArgMax":
            nodes += _top_one(node)
        elif node.op_type == "Mul" and (factors := _range_and_size(node, producers)):
            nodes += _multiplied_range(node, *factors)
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _range_and_size(node: NodeProto, producers: Mapping[str, NodeProto]) -> tuple[NodeProto, str] | None:
    """The Range among a Mul's factors, and the name of the other, if that is a number out of a shape."""
    for one, other in (tuple(node.input), tuple(node.input)[::-1]):
        sequence, size = producers.get(one), producers.get(other)
        if sequence is None or size is None or sequence.op_type != "Range" or size.op_type != "Gather":
            continue
        if (shape := producers.get(size.input[0])) is not None and shape.op_type == "Shape":
            return sequence, other
    return None


def _multiplied_range(node: NodeProto, sequence: NodeProto, size: str) -> list[NodeProto]:
    result, number = node.output[0], f"{node.output[0]}.size"
    nodes = [
        helper.make_node("Constant", [], [f"{number}.scalar"], f"{node.name}/scalar", value=_int64([], shape=[0])),
        helper.make_node("Reshape", [size, f"{number}.scalar"], [number], f"{node.name}/Reshape"),
    ]
    bounds = [f"{result}.bound.{index}" for index in range(3)]
    for bound, given in zip(bounds, sequence.input, strict=True):
        nodes.append(helper.make_node("Mul", [given, number], [bound], f"{bound}/Mul"))
    return [*nodes, helper.make_node("Range", bounds, [result], f"{node.name}/Range")]


def _top_one(node: NodeProto) -> list[NodeProto]:
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    if given.get("select_last_index"):
        return [node]
    axis, result = given.get("axis", 0), node.output[0]
    indices = f"{result}.indices" if not given.get("keepdims", 1) else result
    one, axes = f"{result}.one", f"{result}.axes"
    nodes = [
        helper.make_node("Constant", [], [one], f"{node.name}/one", value=_int64([1])),
        helper.make_node("TopK", [node.input[0], one], [f"{result}.values", indices], f"{node.name}/TopK", axis=axis, largest=1),
    ]
    if indices != result:
        nodes += [
            helper.make_node("Constant", [], [axes], f"{node.name}/axes", value=_int64([axis])),
            helper.make_node("Squeeze", [indices, axes], [result], f"{node.name}/Squeeze"),
        ]
    return nodes


def _int64(values: list[int], shape: Sequence[int] | None = None) -> TensorProto:
    return helper.make_tensor("value", TensorProto.INT64, [len(values)] if shape is None else shape, values)

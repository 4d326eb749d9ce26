"""Expands ONNX Runtime's fused CUDA operators into standard ONNX, to check a fused graph on a machine without a GPU.

Follows ONNX Runtime's ContribOperators.md and its CUDA kernels: norms and activations compute in fp32 and round the result.
MultiHeadAttention, SkipLayerNormalization and Gelu have CPU kernels and are not expanded.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper

from img2img_export.convert.emulation import open_beside

DOMAIN = "com.microsoft"


def expanded(model: ModelProto) -> ModelProto:
    """The graph with the operators that have no CPU kernel expanded. Weights may stay in their file."""
    result = ModelProto()
    result.CopyFrom(model)
    nodes = [new for node in model.graph.node for new in _expand(node)]
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def open_expanded(graph: Path) -> onnxruntime.InferenceSession:
    """Opens a CPU session for the written fused graph `graph`."""
    return open_beside(expanded(onnx.load(str(graph), load_external_data=False)), graph.parent)


class _Writer:
    """Writes the nodes that replace one node; their outputs are named after its first output."""

    def __init__(self, node: NodeProto) -> None:
        self.node = node
        self.nodes: list[NodeProto] = []
        self.attributes: dict[str, Any] = {item.name: helper.get_attribute_value(item) for item in node.attribute}

    def input(self, index: int) -> str:
        """The name of an input, or "" if the node does not have it."""
        return str(self.node.input[index]) if len(self.node.input) > index else ""

    def make(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node, and returns the name of its output."""
        output = f"{self.node.output[0]}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def constant(self, kind: int, *values: float) -> str:
        """Adds a constant vector of type `kind`, and returns its name."""
        return self.make("Constant", value=helper.make_tensor("value", kind, [len(values)], values))

    def fp32(self, name: str) -> str:
        """Adds a cast of `name` to fp32, and returns its name."""
        return self.make("Cast", name, to=TensorProto.FLOAT)

    def finish(self, value: str, index: int = 0) -> None:
        """Makes `value`, cast to the type of the node's first input, the output `index`."""
        self.nodes.append(helper.make_node("CastLike", [value, self.input(0)], [self.node.output[index]]))


def _expand(node: NodeProto) -> list[NodeProto]:
    expand = _EXPANSIONS.get(node.op_type) if node.domain == DOMAIN else None
    if expand is None:
        return [node]
    writer = _Writer(node)
    expand(writer)
    return writer.nodes


def _nhwc_conv(writer: _Writer) -> None:
    """A convolution of [B, H, W, C] by [O, h, w, C]."""
    value = writer.make("Transpose", writer.input(0), perm=[0, 3, 1, 2])
    weight = writer.make("Transpose", writer.input(1), perm=[0, 3, 1, 2])
    bias = [writer.input(2)] if writer.input(2) else []
    writer.finish(writer.make("Transpose", writer.make("Conv", value, weight, *bias, **writer.attributes), perm=[0, 2, 3, 1]))


def _group_norm(writer: _Writer) -> None:
    """GroupNorm of [B, H, W, C], followed by SiLU if `activation` is 1."""
    _normalize(writer, writer.fp32(writer.input(0)))


def _skip_group_norm(writer: _Writer) -> None:
    """GroupNorm of the sum of [B, H, W, C], a skip connection of that shape or [B, 1, 1, C], and a bias [C]; and that sum."""
    total = writer.make("Add", writer.fp32(writer.input(0)), writer.fp32(writer.input(3)))
    if writer.input(4):
        total = writer.make("Add", total, writer.fp32(writer.input(4)))
    if len(writer.node.output) > 1:
        writer.finish(total, 1)
    _normalize(writer, total)


def _normalize(writer: _Writer, value: str) -> None:
    assert writer.attributes.get("channels_last", 1), "fused graphs are channels-last"
    groups = writer.attributes["groups"]
    value = writer.make("Transpose", value, perm=[0, 3, 1, 2])
    shape = writer.make("Shape", value)
    grouped = writer.make("Reshape", value, writer.constant(TensorProto.INT64, 0, groups, -1))
    ones, zeros = (writer.constant(TensorProto.FLOAT, *[number] * groups) for number in (1.0, 0.0))
    epsilon = writer.attributes["epsilon"]
    normal = writer.make("Reshape", writer.make("InstanceNormalization", grouped, ones, zeros, epsilon=epsilon), shape)
    normal = writer.make("Transpose", normal, perm=[0, 2, 3, 1])
    result = writer.make("Add", writer.make("Mul", normal, writer.input(1)), writer.input(2))
    if writer.attributes.get("activation"):
        result = writer.make("Mul", result, writer.make("Sigmoid", result))
    writer.finish(result)


def _bias_split_gelu(writer: _Writer) -> None:
    """[B, S, 2D] and a bias [2D]: the first half of their sum times GELU of the second, [B, S, D]."""
    total = writer.make("Add", writer.fp32(writer.input(0)), writer.fp32(writer.input(1)))
    output = f"{total}.half"
    writer.nodes.append(helper.make_node("Split", [total], [f"{output}_0", f"{output}_1"], axis=-1, num_outputs=2))
    root, half, one = (writer.constant(TensorProto.FLOAT, number) for number in (2**0.5, 0.5, 1.0))
    error = writer.make("Add", writer.make("Erf", writer.make("Div", f"{output}_1", root)), one)
    gelu = writer.make("Mul", writer.make("Mul", f"{output}_1", error), half)
    writer.finish(writer.make("Mul", f"{output}_0", gelu))


def _bias_add(writer: _Writer) -> None:
    """[B, S, D] plus a bias [D] plus a skip connection [B, S, D]."""
    total = writer.make("Add", writer.fp32(writer.input(0)), writer.fp32(writer.input(1)))
    writer.finish(writer.make("Add", total, writer.fp32(writer.input(2))))


_EXPANSIONS: dict[str, Callable[[_Writer], None]] = {
    "NhwcConv": _nhwc_conv,
    "GroupNorm": _group_norm,
    "SkipGroupNorm": _skip_group_norm,
    "BiasSplitGelu": _bias_split_gelu,
    "BiasAdd": _bias_add,
}

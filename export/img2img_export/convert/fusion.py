"""Rewrites the graph of an fp16 UNet or VAE with ONNX Runtime's fused CUDA operators, without loading its weights.

The fusions come from onnxruntime.transformers, which requires a complete model. It gets the graph with placeholders for the large
weights (names and shapes only) and the values of the small ones (norms, biases). Three of its passes are replaced: its attention
concatenates self-attention's weights and fails with numpy 2.4; its GroupNorm takes fp32 only; its NhwcConv reads and transposes
the weights. Here, attention becomes MultiHeadAttention with separate queries, keys and values. The package's VAE attention
replaces the biases with zeros, which this one keeps; its CLIP attention concatenates, so CLIP is not fused.

The operators have no CPU kernels; contrib_functions.py expands them into standard ONNX operators.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, shape_inference
from onnxruntime.transformers.fusion_bias_add import FusionBiasAdd
from onnxruntime.transformers.fusion_biassplitgelu import FusionBiasSplitGelu
from onnxruntime.transformers.fusion_group_norm import FusionGroupNorm
from onnxruntime.transformers.fusion_skip_group_norm import FusionSkipGroupNorm
from onnxruntime.transformers.fusion_transpose import FusionInsertTranspose
from onnxruntime.transformers.onnx_model_unet import UnetOnnxModel

from img2img_export.convert.external_weights import TORCH_TYPES, ExternalWeightsGraph, Weight, constants

DOMAIN = "com.microsoft"
SPLIT_GELU_WIDTHS = (2560, 5120, 10240)
BIAS_ADD_WIDTHS = (320, 640, 1280)
"""Widths supported by the CUDA kernels of BiasSplitGelu and BiasAdd (ORT's contrib_ops/cuda/diffusion)."""
_NHWC = (0, 2, 3, 1)
_NCHW = (0, 3, 1, 2)


def fuse(graph: ExternalWeightsGraph) -> ExternalWeightsGraph:
    """Fuses the graph of an fp16 UNet or VAE. `graph` is not changed.

    Convolution weights are transposed when written; all others stay the same.
    """
    model = _with_placeholders(graph)
    weights = dict(graph.weights)
    _fuse_attention(model)
    optimizer = _Optimizer(model, weights)
    optimizer.run()
    result = ExternalWeightsGraph(optimizer.model, weights)
    own = [item for item in result.model.graph.initializer if item.name not in weights]
    del result.model.graph.initializer[:]
    result.model.graph.initializer.extend(own)
    del result.model.graph.value_info[:]
    if all(entry.domain != DOMAIN for entry in result.model.opset_import):
        result.model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    result.drop_unused()
    return result


def _with_placeholders(graph: ExternalWeightsGraph) -> ModelProto:
    """A model for the fusion passes, with the types of its edges: matrices and kernels have names and shapes but no values."""
    model = ModelProto()
    model.CopyFrom(graph.model)
    model.graph.initializer.extend(_placeholder(name, weight) for name, weight in graph.weights.items())
    model.graph.value_info.extend(shape_inference.infer_shapes(model).graph.value_info)
    return model


def _placeholder(name: str, weight: Weight) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TORCH_TYPES[weight.dtype], dims=weight.shape)
    if sum(size > 1 for size in weight.shape) <= 1:
        tensor.raw_data = weight.array().tobytes()
    else:
        # The file does not exist, so reading the values fails.
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="not in memory")
    return tensor


class _GroupNorm(FusionGroupNorm):  # type: ignore[misc]
    """GroupNorm's scale and shift are fp32 in an fp16 graph too."""

    def add_initializer(self, name: str, data_type: int, dims: Any, vals: Any, raw: bool = True) -> None:
        """Adds the initializer with its values in fp32."""
        super().add_initializer(name, data_type, dims, np.asarray(vals, dtype=np.float32), raw)


class _Optimizer(UnetOnnxModel):  # type: ignore[misc]
    """Runs the passes for a UNet in the package's order.

    The package repeats its symbolic shape inference in four passes and for casts, which was two thirds of the time. Here it runs
    once: casts need only types, and the passes after GroupNorm's keep all names and shapes.
    """

    def __init__(self, model: ModelProto, weights: dict[str, Weight]) -> None:
        super().__init__(model)
        self._weights = weights

    def run(self) -> None:
        """Fuses the model in place, and adds the transposed weights."""
        self.utils.remove_identity_nodes()
        self.enable_shape_infer = False  # the model has the types
        self.utils.remove_useless_cast_nodes()
        self.enable_shape_infer = True
        self.fuse_gelu()
        self.preprocess()
        self.fuse_reshape()
        _GroupNorm(self, channels_last=True).apply()
        FusionInsertTranspose(self).apply()
        if self._widths("ff.net.0.proj.bias") <= set(SPLIT_GELU_WIDTHS):
            FusionBiasSplitGelu(self).apply()
        self.fuse_skip_layer_norm()
        self.fuse_shape()
        self.utils.remove_useless_reshape_nodes()
        FusionSkipGroupNorm(self).apply()
        self.fuse_add_bias_skip_layer_norm()
        self.convert_conv_to_nhwc()
        self.merge_adjacent_transpose()
        if self._widths("ff.net.2.bias") <= set(BIAS_ADD_WIDTHS):
            FusionBiasAdd(self).apply()
        self.postprocess()
        self.topological_sort()

    def infer_runtime_shape(self, dynamic_axis_mapping: Any = None, update: bool = False) -> Any:
        """The shapes of edges, inferred when a pass first asks for them; None if that is disabled or fails."""
        return super().infer_runtime_shape({}, update=False)

    def nodes(self) -> list[NodeProto]:
        """All nodes."""
        return [node for graph in self.graphs() for node in graph.node]

    def get_children(self, node: NodeProto, input_name_to_nodes: Any = None, output_index: int | None = None) -> list[NodeProto]:
        """The nodes that read `node`, without a table of the whole graph."""
        if input_name_to_nodes is None:
            nodes = self.nodes()
            input_name_to_nodes = {
                name: [child for child in nodes for read in child.input if read == name] for name in node.output if name
            }
        children: list[NodeProto] = super().get_children(node, input_name_to_nodes, output_index)
        return children

    def convert_conv_to_nhwc(self) -> None:
        """Converts convolutions to channels-last; their weights are transposed when written."""
        for node in self.get_nodes_by_op_type("Conv"):
            weight = self._weights.get(node.input[1])
            if weight is None or len(weight.shape) != 4 or weight.is_reshaped:
                continue
            name = f"{node.input[1]}.nhwc"
            self._weights[name] = weight.transposed(_NHWC)
            self.add_initializer(_placeholder(name, self._weights[name]))
            before, after = f"{node.output[0]}.nhwc_in", f"{node.output[0]}.nhwc_out"
            conv = helper.make_node("NhwcConv", [before, name, *node.input[2:]], [after], f"{node.name}_nhwc", domain=DOMAIN)
            conv.attribute.extend(node.attribute)
            self.add_node(_transpose(node.input[0], before, _NHWC))
            self.add_node(conv)
            self.add_node(_transpose(after, node.output[0], _NCHW))
            self.remove_node(node)

    def _widths(self, suffix: str) -> set[int]:
        return {weight.shape[0] for name, weight in self._weights.items() if name.endswith(suffix)}


def _transpose(source: str, target: str, permutation: tuple[int, ...]) -> NodeProto:
    return helper.make_node("Transpose", [source], [target], f"{target}.transpose", perm=permutation)


@dataclass(frozen=True, slots=True)
class _Finder:
    """Searches a graph from outputs towards inputs."""

    producers: Mapping[str, NodeProto]
    known: Mapping[str, np.ndarray]

    def path(self, name: str, *kinds: str) -> NodeProto | None:
        """Follows first inputs upwards from `name` through nodes of these `kinds`; returns the last node, or None."""
        node: NodeProto | None = None
        for kind in kinds:
            node = self.producers.get(name)
            if node is None or node.op_type != kind:
                return None
            name = node.input[0] if node.input else ""
        return node

    def scaled(self, name: str) -> NodeProto | None:
        """The Reshape of queries or keys in Mul(Transpose(Reshape(...)), sqrt(scale)), or None."""
        product = self.path(name, "Mul")
        if product is None or self.scale(product) is None:
            return None
        return self.path(product.input[0], "Transpose", "Reshape")

    def scale(self, product: NodeProto) -> float | None:
        """The attention scale, if the Mul `product` multiplies by its root: a constant (graph_kinds.py) or the Sqrt of one."""
        name = self._before_cast(product.input[1])
        root = self.path(name, "Sqrt")
        value = self.known.get(self._before_cast(root.input[0]) if root else name)
        if value is None or value.size != 1:
            return None
        return float(value.item()) if root else float(value.item()) ** 2

    def _before_cast(self, name: str) -> str:
        cast = self.path(name, "Cast")
        return cast.input[0] if cast else name

    def heads(self, reshape: NodeProto) -> int | None:
        """The number of heads: the third size in a Reshape's shape, if constant."""
        shape = self.path(reshape.input[1], "Concat")
        part = shape and self.path(shape.input[2], "Unsqueeze")
        value = self.known.get(part.input[0]) if part else None
        return None if value is None else int(value.item())


def _fuse_attention(model: ModelProto) -> None:
    """Replaces torch's scaled_dot_product_attention without a mask with MultiHeadAttention, and removes unused nodes.

    Unused nodes are half of a graph or more, and the package's passes take quadratic time in the number of nodes.
    """
    nodes = list(model.graph.node)
    finder = _Finder({name: node for node in nodes for name in node.output}, constants(model))
    used = {output.name for output in model.graph.output}
    kept: list[NodeProto] = []
    for node in reversed([_attention(node, finder) or node for node in nodes]):
        if used.intersection(node.output):
            used.update(node.input)
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))


def _attention(node: NodeProto, finder: _Finder) -> NodeProto | None:
    """The MultiHeadAttention for the Reshape `node` that joins the heads, or None."""
    product = finder.path(node.output[0], "Reshape", "Transpose", "MatMul") if node.op_type == "Reshape" else None
    scores = product and finder.path(product.input[0], "Softmax", "MatMul")
    if not product or not scores:
        return None
    query, key = finder.scaled(scores.input[0]), finder.scaled(scores.input[1])
    value = finder.path(product.input[1], "Transpose", "Reshape")
    heads = finder.heads(query) if query else None
    scale = finder.scale(finder.producers[scores.input[0]]) if query and key else None
    if not query or not key or not value or not heads or scale is None:
        return None
    inputs = [query.input[0], key.input[0], value.input[0]]
    name = node.name.rpartition("/")[0] + "/MultiHeadAttention"
    return helper.make_node("MultiHeadAttention", inputs, [node.output[0]], name, domain=DOMAIN, num_heads=heads, scale=scale)

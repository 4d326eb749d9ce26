"""Traces a PyTorch module to an ONNX graph without its weights in memory."""

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper

from img2img_export.convert.external_weights import ExternalWeightsGraph, Weight, without_weights
from img2img_export.convert.fused_attention import declare_types, fusing
from img2img_export.convert.parts import Part, Tensors
from img2img_export.errors import FAILURES, ExportError, first_line

OPSET = 18
_FLOATS = {onnx.TensorProto.FLOAT: torch.float32, onnx.TensorProto.FLOAT16: torch.float16}


class _Flat(torch.nn.Module):
    """The module as a function of its graph's inputs, in order."""

    def __init__(self, module: Any, call: Callable[[Any, Tensors], Tensors], names: list[str]) -> None:
        super().__init__()
        self.module = module
        self._call_by_name = call
        self._names = names

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self._call_by_name(self.module, dict(zip(self._names, tensors, strict=True))).values())


def trace(
    module: Any,
    part: Part,
    example: Tensors,
    dtype: torch.dtype = torch.float32,
    fused_attention: bool = False,
    for_bf16: bool = False,
) -> ExternalWeightsGraph:
    """The graph of `module` called with inputs like `example`, computing in `dtype` (fp32 or fp16).

    With `fused_attention`, attention is ONNX Runtime's operator (fused_attention.py). With `for_bf16`, the graph will be
    converted to bf16: parts that transformers keeps in fp32 only for fp16 are traced in fp16, too.
    Raises ExportError if torch cannot export it.
    """
    inputs = {name: convert(part, name, value, dtype) for name, value in example.items()}
    names = list(inputs)
    file = io.BytesIO()
    try:
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            without_weights(module, dtype, for_bf16) as weights,
            part.kind.patched(),
            fusing() if fused_attention else contextlib.nullcontext(),
        ):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Flat(module, part.call, names).eval(),
                tuple(inputs.values()),
                cast(Any, file),
                input_names=names,
                output_names=list(part.outputs),
                dynamic_axes={**part.inputs, **part.outputs},
                opset_version=OPSET,
                export_params=False,
                do_constant_folding=False,
                dynamo=False,
                verbose=False,  # else the whole graph is printed if an operator has no ONNX counterpart
            )
    except FAILURES as error:
        raise ExportError(f"torch cannot export {part.name}: {type(error).__name__}: {first_line(error)}") from error
    model = onnx.load_from_string(file.getvalue())
    if fused_attention:
        declare_types(model, dtype)
    return _with_external_weights(model, weights, names)


def convert(part: Part, name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Converts the input `name` for a graph that computes in `dtype`."""
    if name in part.kind.EXACT:
        return value.to(torch.float32)
    return value.to(dtype) if value.is_floating_point() else value


def _with_external_weights(model: onnx.ModelProto, real: Tensors, names: list[str]) -> ExternalWeightsGraph:
    """Moves the module's parameters from the graph's inputs to the weights."""
    weights = {}
    for item in [item for item in model.graph.input if item.name not in names]:
        source = real[item.name.removeprefix("module.")]
        weights[item.name] = Weight.of(source, _FLOATS.get(item.type.tensor_type.elem_type, source.dtype))
        model.graph.input.remove(item)
    make_recordable(model)
    graph = ExternalWeightsGraph(model, weights)
    graph.fold()
    return graph


def make_recordable(model: ModelProto) -> None:
    """Rewrites nodes in place so that CUDA graphs can record the graph; results are bit-identical.

    ArgMax becomes TopK with k = 1, which the CUDA provider also supports for integers: both return the lowest index of equal
    values. Range(a, b, c) * size becomes Range(a * size, b * size, c * size), whose bounds are computed on the host.
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
    """The Range among a Mul's factors, and the name of the other factor if it is a size taken from a shape; else None."""
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

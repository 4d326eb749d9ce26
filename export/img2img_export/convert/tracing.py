"""PyTorch module -> skeleton of an ONNX graph, without its weights in memory."""

import io
import warnings
from collections.abc import Callable
from typing import Any, cast

import onnx
import torch

from img2img_export.convert.external_weights import Skeleton, Weight, light
from img2img_export.convert.parts import Part, Tensors
from img2img_export.convert.recordable import make_recordable
from img2img_export.errors import FAILURES, ExportError, first_line

OPSET = 18
_EXACT = ("timestep",)
"""Inputs that stay in fp32 in every precision: half precision has no number for most of a schedule's timesteps."""

_FLOATS = {onnx.TensorProto.FLOAT: torch.float32, onnx.TensorProto.FLOAT16: torch.float16}


class _Flat(torch.nn.Module):
    """The module as a function of its graph's inputs in their order."""

    def __init__(self, module: Any, call: Callable[[Any, Tensors], Tensors], names: list[str]) -> None:
        super().__init__()
        self.module = module
        self._call_by_name = call
        self._names = names

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self._call_by_name(self.module, dict(zip(self._names, tensors, strict=True))).values())


def trace(module: Any, part: Part, example: Tensors, dtype: torch.dtype = torch.float32) -> Skeleton:
    """The graph of `module` called with inputs like `example`, computing in `dtype` (fp32 or fp16).

    Raises ExportError, in one line, where torch cannot export it.
    """
    inputs = {name: convert(name, value, dtype) for name, value in example.items()}
    names = list(inputs)
    file = io.BytesIO()
    try:
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            light(module, dtype) as weights,
            part.kind.patched(),
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
                verbose=False,  # else the whole graph is printed where an operator has no counterpart
            )
    except FAILURES as error:
        raise ExportError(f"torch cannot export {part.name}: {type(error).__name__}: {first_line(error)}") from error
    return _skeleton(onnx.load_from_string(file.getvalue()), weights, names)


def convert(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An input as a graph that computes in `dtype` takes it."""
    if name in _EXACT:
        return value.to(torch.float32)
    return value.to(dtype) if value.is_floating_point() else value


def _skeleton(model: onnx.ModelProto, true: Tensors, names: list[str]) -> Skeleton:
    """Takes the module's parameters out of the graph's inputs."""
    weights = {}
    for item in [item for item in model.graph.input if item.name not in names]:
        source = true[item.name.removeprefix("module.")]
        weights[item.name] = Weight.of(source, _FLOATS.get(item.type.tensor_type.elem_type, source.dtype))
        model.graph.input.remove(item)
    make_recordable(model)
    skeleton = Skeleton(model, weights)
    skeleton.fold()
    return skeleton

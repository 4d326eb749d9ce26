"""Describes a written graph (inputs, outputs, precision, size), and lists the errors of running one."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from diffusers.utils import logging as diffusers_logging
from img2img_server.bundle.manifest import Component, TensorSpec
from onnx import TensorProto
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, RuntimeException
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoSuchKernel

from img2img_export.convert.external_weights import DATA_NAME, GRAPH_NAME

RUNTIME_ERRORS = (Fail, InvalidArgument, InvalidGraph, NoSuchKernel, RuntimeException)
"""Errors of ONNX Runtime for a graph or inputs that it cannot run. They have no common base class."""

_PRECISIONS = {TensorProto.INT8: "int8", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
"""Weight types that determine a graph's precision: the first one present."""


def describe_graph(bundle: Path, name: str) -> Component:
    """Reads the inputs, outputs, opset and precision of the graph in the folder `name` of `bundle`."""
    path = bundle / name / GRAPH_NAME
    model = onnx.load(str(path), load_external_data=False)
    opset = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
    kinds = {item.data_type for item in model.graph.initializer}
    precision = next((word for kind, word in _PRECISIONS.items() if kind in kinds), "fp32")
    data = path.with_name(DATA_NAME)
    size = path.stat().st_size + (data.stat().st_size if data.is_file() else 0)
    return Component(name, precision, opset, _specs(model.graph.input), _specs(model.graph.output), bytes=size)


def _specs(values: Any) -> tuple[TensorSpec, ...]:
    specs = []
    for value in values:
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        specs.append(TensorSpec(value.name, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape))
    return tuple(specs)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the logs, warnings and progress bars of optimum, torch's exporter and diffusers within the block."""
    loggers = [logging.getLogger(name) for name in ("optimum", "transformers", "diffusers", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    diffusers_logging.disable_progress_bar()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

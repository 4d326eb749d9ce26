"""An ONNX graph whose weights stay in the checkpoint: it is changed and written without loading them into memory.

The graph is a few megabytes whatever the model's size. Each weight is a tensor of the PyTorch module (mapped from the checkpoint,
so only pages in use are in memory) plus a permutation of axes, a shape and a type. Weights are written one at a time, so the peak
memory of an export is the module.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from transformers import PreTrainedModel

from img2img_export.progress import Progress

GRAPH_NAME = "model.onnx"
DATA_NAME = "model.onnx_data"
"""File name of the weights, the same as optimum's."""

TORCH_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}

_INLINE_BYTES = 1024
"""Weights up to this size are stored in the graph's file: shape inference and optimizers read them."""
_PAGE = 4096
_LARGE_BYTES = 1 << 20
_FIRST_BITS = 0x1419
"""The bits of 0.001 in half precision. Successive bit patterns give numbers that differ in every precision."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the module as used in the graph: axes permuted, then reshaped to `shape`, then converted to `dtype`."""

    source: torch.Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]
    permutation: tuple[int, ...] | None = None

    @classmethod
    def of(cls, source: torch.Tensor, dtype: torch.dtype) -> "Weight":
        """An unpermuted weight; only floating-point tensors are converted to `dtype`."""
        return cls(source, dtype if source.is_floating_point() else source.dtype, tuple(source.shape))

    @property
    def bytes(self) -> int:
        """Bytes when written."""
        return math.prod(self.shape) * self.dtype.itemsize

    def transposed(self, permutation: tuple[int, ...]) -> "Weight":
        """The weight after an ONNX Transpose."""
        if self.permutation is not None:
            permutation = tuple(self.permutation[axis] for axis in permutation)
        return replace(self, permutation=permutation, shape=tuple(self.source.shape[axis] for axis in permutation))

    def reshaped(self, shape: tuple[int, ...]) -> "Weight":
        """The weight in another shape with the same number of elements."""
        return replace(self, shape=shape)

    @property
    def is_reshaped(self) -> bool:
        """Whether the weight has been reshaped, so that it can no longer be transposed."""
        order = self.permutation or range(self.source.ndim)
        return self.shape != tuple(self.source.shape[axis] for axis in order)

    def read(self) -> torch.Tensor:
        """The values, contiguous; a copy if anything about them changes."""
        value = self.source.detach()
        if self.permutation is not None:
            value = value.permute(self.permutation)
        return value.to(self.dtype).contiguous().reshape(self.shape)

    def array(self) -> np.ndarray:
        """The values as a NumPy array; bfloat16 as its bits in int16."""
        value = self.read()
        return value.view(torch.int16).numpy() if value.dtype == torch.bfloat16 else value.numpy()


@dataclass(slots=True)
class ExternalWeightsGraph:
    """A graph, and the weights that its nodes refer to but its initializers do not contain."""

    model: ModelProto
    weights: dict[str, Weight]

    @property
    def bytes(self) -> int:
        """Bytes of the weights when written."""
        return sum(weight.bytes for weight in self.weights.values())

    def copy(self) -> "ExternalWeightsGraph":
        """A copy of the graph that shares the weights."""
        model = ModelProto()
        model.CopyFrom(self.model)
        return ExternalWeightsGraph(model, dict(self.weights))

    def fold(self) -> None:
        """Folds nodes that only reshape a weight (Transpose, Unsqueeze) into it, and drops unused weights and constants."""
        known = constants(self.model)
        kept: list[NodeProto] = []
        renamed: dict[str, str] = {}
        for node in self.model.graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = renamed.get(name, name)
            folded = _fold(node, self.weights, known)
            if folded is None:
                kept.append(node)
                continue
            name = f"{node.input[0]}.{node.op_type.lower()}"
            while self.weights.get(name, folded) != folded:
                name += "_"
            self.weights[name] = folded
            renamed[node.output[0]] = name
        del self.model.graph.node[:]
        self.model.graph.node.extend(kept)
        self.drop_unused()

    def drop_unused(self) -> None:
        """Drops nodes and weights that have no effect on an output."""
        graph = self.model.graph
        used = {output.name for output in graph.output}
        kept = []
        for node in reversed(graph.node):  # a node comes after those whose results it reads
            if not used.isdisjoint(node.output):
                used.update(_read_by(node))
                kept.append(node)
        self.weights = {name: weight for name, weight in self.weights.items() if name in used}
        del graph.node[:]
        graph.node.extend(reversed(kept))

    def write(
        self, folder: Path, progress: Progress, label: str, beside: "Mapping[str, ExternalWeightsGraph] | None" = None
    ) -> None:
        """Writes the graph and its weights into `folder`, and the graphs `beside` it, by file name, which share its weights."""
        folder.mkdir(parents=True, exist_ok=True)
        written: dict[object, TensorProto] = {}
        with (folder / DATA_NAME).open("wb") as data, progress.task(label, self.bytes) as advance:
            for file, graph in {GRAPH_NAME: self, **(beside or {})}.items():
                model = ModelProto()
                model.CopyFrom(graph.model)
                for name, weight in graph.weights.items():
                    key = (id(weight.source), weight.dtype, weight.shape, weight.permutation)
                    if key not in written:
                        written[key] = _write(weight, data)
                        advance(weight.bytes)
                    model.graph.initializer.add().CopyFrom(written[key])
                    model.graph.initializer[-1].name = name
                onnx.save(model, str(folder / file))
            empty = data.tell() == 0
        if empty:
            (folder / DATA_NAME).unlink()


def _write(weight: Weight, data: BinaryIO) -> TensorProto:
    tensor = TensorProto(data_type=TORCH_TYPES[weight.dtype], dims=weight.shape)
    content = np.atleast_1d(weight.array()).view(np.uint8).data
    if weight.bytes <= _INLINE_BYTES:
        tensor.raw_data = bytes(content)
        return tensor
    # Large weights start on a page boundary, so that ONNX Runtime can map them.
    data.seek(-data.tell() % (_PAGE if weight.bytes >= _LARGE_BYTES else 64), os.SEEK_CUR)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", DATA_NAME), ("offset", str(data.tell())), ("length", str(weight.bytes))):
        tensor.external_data.add(key=key, value=value)
    data.write(content)
    return tensor


def constants(model: ModelProto) -> dict[str, np.ndarray]:
    """The values of the graph's small constants, by name."""
    found = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer if item.HasField("raw_data")}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return found


def _read_by(node: NodeProto) -> Iterator[str]:
    """The names that a node reads, also in its subgraphs."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from (output.name for output in graph.output)
            for inner in graph.node:
                yield from _read_by(inner)


def _fold(node: NodeProto, weights: dict[str, Weight], known: dict[str, np.ndarray]) -> Weight | None:
    """The weight that `node` produces from a weight, or None if the node is not foldable."""
    weight = weights.get(node.input[0]) if node.input else None
    if weight is None:
        return None
    if node.op_type == "Identity":
        return weight
    if node.op_type == "Transpose" and not weight.is_reshaped:
        return weight.transposed(tuple(node.attribute[0].ints))
    if node.op_type == "Unsqueeze" and node.input[1] in known:
        axes = {int(axis) for axis in known[node.input[1]].reshape(-1)}
        rank = len(weight.shape) + len(axes)
        axes = {axis % rank for axis in axes}
        sizes = iter(weight.shape)
        return weight.reshaped(tuple(1 if axis in axes else next(sizes) for axis in range(rank)))
    return None


@contextlib.contextmanager
def without_weights(module: torch.nn.Module, dtype: torch.dtype, for_bf16: bool = False) -> Iterator[dict[str, torch.Tensor]]:
    """Replaces the parameters of `module` with placeholders in `dtype` that take no memory; yields the real ones by name.

    Each placeholder is one number expanded to the parameter's shape. The numbers differ, so that no two parameters are merged.
    Buffers keep their values. Buffers that are not in checkpoints also keep their types: rotary frequencies in half precision
    would be wrong by radians. Parts that the class requires in fp32 stay in fp32. Some classes of transformers
    require it only instead of fp16 (T5's `wo`).
    """
    required = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if not (for_bf16 and isinstance(module, PreTrainedModel)):
        required.update(getattr(module, "_keep_in_fp32_modules", None) or ())
    fp32_parts = tuple(required)
    real: dict[str, torch.Tensor] = {}
    placeholders: dict[int, torch.nn.Parameter] = {}
    originals: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []
    for prefix, part in module.named_modules():
        for table, is_buffer in ((part._parameters, False), (part._buffers, True)):
            for leaf, value in table.items():
                if value is None:
                    continue
                name = f"{prefix}.{leaf}" if prefix else leaf
                kind = torch.float32 if any(word in name.split(".") for word in fp32_parts) else dtype
                originals.append((table, leaf, value))
                real.setdefault(name, value)
                if is_buffer:
                    is_stored = leaf not in part._non_persistent_buffers_set
                    table[leaf] = value.to(kind) if value.is_floating_point() and is_stored else value
                else:
                    number = torch.tensor(_FIRST_BITS + len(placeholders), dtype=torch.int16).view(torch.float16).to(kind)
                    seen = torch.nn.Parameter(number.expand(value.shape), requires_grad=False)
                    table[leaf] = placeholders.setdefault(id(value), seen)
    try:
        yield real
    finally:
        for table, leaf, value in originals:
            table[leaf] = value

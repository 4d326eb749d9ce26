"""An ONNX graph whose weights are still where the checkpoint keeps them: it is changed and written without them in memory.

The graph is a few megabytes whatever the model's size. Each of its weights is a tensor of the PyTorch module (of which
only the pages in use are in memory where the checkpoint is mapped) and what is to become of it: an order of axes, a shape, a
type. Writing takes one weight at a time, so an export's peak is the module and no more.
"""

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from img2img_export.progress import Progress

GRAPH_NAME = "model.onnx"
DATA_NAME = "model.onnx_data"
"""The file of the weights, as optimum names it."""

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
"""Weights up to this size stay in the graph's own file: shape inference and optimizers look at small ones."""
_PAGE = 4096
_LARGE_BYTES = 1 << 20
_FIRST_BITS = 0x1419
"""Of 0.001 in half precision; the numbers after it are as many as one likes, and none is equal to another in any precision."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the module as the graph wants it: its axes permuted, then given `shape`, then converted to `dtype`."""

    source: torch.Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]
    permutation: tuple[int, ...] | None = None

    @classmethod
    def of(cls, source: torch.Tensor, dtype: torch.dtype) -> "Weight":
        """The tensor as it is; only floating-point tensors are converted."""
        return cls(source, dtype if source.is_floating_point() else source.dtype, tuple(source.shape))

    @property
    def bytes(self) -> int:
        """What it takes when written."""
        return math.prod(self.shape) * self.dtype.itemsize

    def transposed(self, permutation: tuple[int, ...]) -> "Weight":
        """The weight behind an ONNX Transpose."""
        if self.permutation is not None:
            permutation = tuple(self.permutation[axis] for axis in permutation)
        return replace(self, permutation=permutation, shape=tuple(self.source.shape[axis] for axis in permutation))

    def reshaped(self, shape: tuple[int, ...]) -> "Weight":
        """The weight with as many elements in another shape."""
        return replace(self, shape=shape)

    @property
    def is_reshaped(self) -> bool:
        """Whether the shape is another than the axes' own: then it can't be transposed any more."""
        order = self.permutation or range(self.source.ndim)
        return self.shape != tuple(self.source.shape[axis] for axis in order)

    def read(self) -> torch.Tensor:
        """The values, contiguous, in memory of their own where anything about them changes."""
        value = self.source.detach()
        if self.permutation is not None:
            value = value.permute(self.permutation)
        return value.to(self.dtype).contiguous().reshape(self.shape)

    def array(self) -> np.ndarray:
        """The values as NumPy knows them; bfloat16 as its bits in int16."""
        value = self.read()
        return value.view(torch.int16).numpy() if value.dtype == torch.bfloat16 else value.numpy()


@dataclass(slots=True)
class Skeleton:
    """A graph, and the weights that its nodes name but that are in none of its initializers."""

    model: ModelProto
    weights: dict[str, Weight]

    @property
    def bytes(self) -> int:
        """What the weights take when written."""
        return sum(weight.bytes for weight in self.weights.values())

    def copy(self) -> "Skeleton":
        """One whose graph can be changed; the weights are shared."""
        model = ModelProto()
        model.CopyFrom(self.model)
        return Skeleton(model, dict(self.weights))

    def fold(self) -> None:
        """Does what the graph does to a weight alone (Transpose, Unsqueeze) to the weight, and drops what nothing reads."""
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
        """Drops weights that no node reads, and constants likewise."""
        used = Counter(name for node in self.model.graph.node for name in node.input)
        used.update(output.name for output in self.model.graph.output)
        self.weights = {name: weight for name, weight in self.weights.items() if used[name]}
        kept = [node for node in self.model.graph.node if node.op_type != "Constant" or used[node.output[0]]]
        del self.model.graph.node[:]
        self.model.graph.node.extend(kept)

    def write(self, folder: Path, progress: Progress, label: str) -> None:
        """Writes the graph and, beside it, its weights into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        model = ModelProto()
        model.CopyFrom(self.model)
        with (folder / DATA_NAME).open("wb") as data, progress.task(label, self.bytes) as advance:
            for name, weight in self.weights.items():
                model.graph.initializer.append(_write(name, weight, data))
                advance(weight.bytes)
            empty = data.tell() == 0
        if empty:
            (folder / DATA_NAME).unlink()
        onnx.save(model, str(folder / GRAPH_NAME))


def _write(name: str, weight: Weight, data: BinaryIO) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TORCH_TYPES[weight.dtype], dims=weight.shape)
    content = np.atleast_1d(weight.array()).view(np.uint8).data
    if weight.bytes <= _INLINE_BYTES:
        tensor.raw_data = bytes(content)
        return tensor
    # A large one begins a page of its own, so that ONNX Runtime can map it.
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


def _fold(node: NodeProto, weights: dict[str, Weight], known: dict[str, np.ndarray]) -> Weight | None:
    """What `node` makes of a weight, or None where that isn't all it does."""
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
def light(module: torch.nn.Module, dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    """Lets `module` compute in `dtype` on parameters that take no memory; gives the true ones by name.

    Each parameter is one number, seen in the parameter's shape. The numbers differ, so that nothing takes two for the same.
    Buffers keep their values. Where the class says that a part must stay in fp32 (T5's `wo`), it does.
    """
    upright = tuple(getattr(module, "_keep_in_fp32_modules", None) or ())
    true: dict[str, torch.Tensor] = {}
    stand_ins: dict[int, torch.nn.Parameter] = {}
    places: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []
    for prefix, part in module.named_modules():
        for table, is_buffer in ((part._parameters, False), (part._buffers, True)):
            for leaf, value in table.items():
                if value is None:
                    continue
                name = f"{prefix}.{leaf}" if prefix else leaf
                kind = torch.float32 if any(word in name.split(".") for word in upright) else dtype
                places.append((table, leaf, value))
                true.setdefault(name, value)
                if is_buffer:
                    table[leaf] = value.to(kind) if value.is_floating_point() else value
                else:
                    number = torch.tensor(_FIRST_BITS + len(stand_ins), dtype=torch.int16).view(torch.float16).to(kind)
                    seen = torch.nn.Parameter(number.expand(value.shape), requires_grad=False)
                    table[leaf] = stand_ins.setdefault(id(value), seen)
    try:
        yield true
    finally:
        for table, leaf, value in places:
            table[leaf] = value

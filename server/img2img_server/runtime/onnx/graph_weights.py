"""The weights of ONNX graphs: where they lie in their weights file, and copies on the GPU that the graphs of a component share.

Graphs are read without the onnx package. The messages are the part of ONNX's protobuf schema that is needed: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto

By default each session copies the weights of its graph to the GPU. With `add_initializer` it uses values that are there already.
ONNX Runtime's optimizers read the file all the same: a weight that one of them changed in place would be wrong, without an error.
`open_session` disables the one that may; tests/cuda/test_shared_weights.py compares the weights of optimized graphs with the
file.
"""

import functools
import math
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from img2img_server.errors import BundleError
from img2img_server.runtime.common.out_of_memory import RUNTIME_ERRORS

_PACKAGE = "img2img.graph_weights"
_INT32, _INT64, _STRING, _MESSAGE = 5, 3, 9, 11
"""Types of fields in descriptor.proto."""
_OPTIONAL, _REPEATED = 1, 3
"""Their labels."""
_LISTS = ("dims", "external_data", "initializer")
_EXTERNAL = 1
"""TensorProto's data_location of weights in another file."""
_TYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    6: torch.int32,
    7: torch.int64,
    10: torch.float16,
    16: torch.bfloat16,
}
"""TensorProto's data types that torch has."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor in a file: where it begins, in bytes, its shape and its type."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """A copy of the tensor."""
        values = torch.from_file(str(self.file), shared=False, size=self.offset + self.bytes, dtype=torch.uint8)
        return values[self.offset :].clone().view(self.dtype).reshape(self.shape)  # offsets may not be multiples of the type


def external_weights(graph: Path) -> dict[str, Place]:
    """The weights of a graph that lie in files beside it, by name; those of types that torch lacks are left out. Empty if the
    graph cannot be read, which its session then reports."""
    model = _model_class()()
    try:
        model.ParseFromString(graph.read_bytes())
    except (OSError, DecodeError):
        return {}
    found = {}
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        file = graph.parent / entries.get("location", "")
        if tensor.data_location != _EXTERNAL or tensor.data_type not in _TYPES or file.parent != graph.parent:
            continue
        place = Place(file, int(entries.get("offset", 0)), tuple(tensor.dims), _TYPES[tensor.data_type])
        if place.bytes == int(entries.get("length", place.bytes)) and file.is_file():
            found[tensor.name] = place
    return found


@functools.cache
def _model_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="img2img/graph_weights.proto", package=_PACKAGE, syntax="proto2")
    _add(file, "Entry", key=(1, _STRING), value=(2, _STRING))
    _add(
        file,
        "Tensor",
        dims=(1, _INT64),
        data_type=(2, _INT32),
        name=(8, _STRING),
        external_data=(13, "Entry"),
        data_location=(14, _INT32),
    )
    _add(file, "Graph", initializer=(5, "Tensor"))
    _add(file, "Model", graph=(7, "Graph"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)  # type: ignore[no-untyped-call]
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Model"))  # type: ignore[no-untyped-call]


def _add(file: Any, message: str, /, **fields: tuple[int, int | str]) -> None:
    """Adds a message with fields of these numbers and types, of which a text names a message."""
    made = file.message_type.add(name=message)
    for name, (number, kind) in fields.items():
        label = _REPEATED if name in _LISTS else _OPTIONAL
        if isinstance(kind, str):
            made.field.add(name=name, number=number, label=label, type=_MESSAGE, type_name=f".{_PACKAGE}.{kind}")
        else:
            made.field.add(name=name, number=number, label=label, type=kind)


_LEAST = 4096
"""Bytes of the smallest shared weight: smaller ones are often numbers that are needed on the CPU."""


Weights = Mapping[str, torch.Tensor]
"""Tensors on the GPU, by the names of a graph's weights."""


class SharedWeights:
    """The weights on `device` of the graphs of one model, by their place in the weights file. Freed with the last session that
    was opened with them. Thread-safe."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._known: weakref.WeakValueDictionary[Place, torch.Tensor] = weakref.WeakValueDictionary()

    def of(self, graph: Path) -> Weights:
        """The weights of a graph, by name. A weight that another graph uses is not copied to the device again. Empty if the
        directory has no other graph. Raises BundleError if the device has not enough memory."""
        if not any(other != graph for other in graph.parent.glob("*.onnx")):
            return {}
        try:
            with self._lock:
                wanted = {name: place for name, place in external_weights(graph).items() if place.bytes >= _LEAST}
                return {name: self._send(place) for name, place in wanted.items()}
        except RUNTIME_ERRORS as error:
            raise BundleError(f"{graph}: its weights cannot be sent to the GPU: {error}") from error

    def _send(self, place: Place) -> torch.Tensor:
        tensor = self._known.get(place)
        if tensor is None:
            tensor = self._known[place] = place.read().to(self._device)
        return tensor

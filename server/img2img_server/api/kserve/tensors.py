"""Converts KServe tensors, with raw or typed contents, to and from Python values, and checks datatypes and shapes.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_grpc.md
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from img2img_server.errors import InvalidField, NotSupported

Value = bytes | int | float | np.ndarray[Any, np.dtype[np.uint8]] | tuple[bytes, ...]

_FIXED = {"INT32": "<i4", "INT64": "<i8", "FP32": "<f4", "FP64": "<f8", "UINT8": "|u1"}
"""NumPy's names of the datatypes with elements of fixed size. Elements of BYTES are preceded by their length."""
_TYPED = {
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "UINT8": "uint_contents",
    "BYTES": "bytes_contents",
}
_LENGTH = struct.Struct("<I")
_PART = 2**16
_MOST_SHOWN = 100
"""Maximum characters of a caller's value quoted in an error."""


@dataclass(frozen=True, slots=True)
class Input:
    """An input: its name, the accepted datatypes (metadata lists the first), and its shape, -1 for any size."""

    name: str
    datatypes: tuple[str, ...]
    dims: tuple[int, ...] = (1,)


@dataclass(frozen=True, slots=True)
class Output:
    """An output: its name, its datatype and its shape, -1 for any size."""

    name: str
    datatype: str
    dims: tuple[int, ...] = (-1,)


@dataclass(frozen=True, slots=True)
class Given:
    """An input's value. `batched`: its shape had a leading batch dimension of 1."""

    value: Value
    batched: bool


def read(request: Any, inputs: Sequence[Input]) -> dict[str, Given]:
    """The inputs of a ModelInferRequest by name.

    Raises InvalidField, naming the tensor, if one is unknown, duplicate or malformed, and NotSupported for shared memory.
    """
    known = {one.name: one for one in inputs}
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidField(
            "raw_input_contents", f"{len(raw)} entries for {len(request.inputs)} inputs: send exactly one for each input"
        )
    found: dict[str, Given] = {}
    for index, tensor in enumerate(request.inputs):
        if tensor.name not in known:
            raise InvalidField("inputs", f"unknown input {shown(tensor.name)}; known are {', '.join(known)}")
        if tensor.name in found:
            raise InvalidField(tensor.name, "the input is given more than once")
        found[tensor.name] = _read(tensor, raw[index] if raw else None, known[tensor.name])
    return found


def _read(tensor: Any, raw: bytes | None, wanted: Input) -> Given:
    _check_parameters(tensor)
    if tensor.datatype not in wanted.datatypes:
        raise InvalidField(wanted.name, f"datatype is {shown(tensor.datatype)}, expected {' or '.join(wanted.datatypes)}")
    shape, batched = _shape(tensor, wanted)
    count = math.prod(shape)
    if raw is None:
        elements = _typed(tensor, count)
    elif tensor.HasField("contents"):
        raise InvalidField(wanted.name, "contents and raw_input_contents are mutually exclusive: send only one of them")
    else:
        elements = _raw(wanted.name, tensor.datatype, raw, count)
    if tensor.datatype == "UINT8":
        return Given(np.frombuffer(bytes(elements), np.uint8).reshape(shape), batched)
    if wanted.dims == (-1,):
        return Given(tuple(map(bytes, elements)), batched)
    (element,) = elements
    return Given(_shortest(element) if tensor.datatype == "FP32" else element, batched)


def _check_parameters(tensor: Any) -> None:
    for key in sorted(tensor.parameters):
        if key.startswith("shared_memory"):
            raise NotSupported(f"{tensor.name}: shared memory is not supported: send the tensor's contents")
        raise InvalidField(tensor.name, f"unknown input parameter {shown(key)}")


def _shape(tensor: Any, wanted: Input) -> tuple[tuple[int, ...], bool]:
    """The shape without its batch dimension, and whether it had one."""
    if len(tensor.shape) > len(wanted.dims) + 1:
        raise InvalidField(wanted.name, f"shape has {len(tensor.shape)} dimensions, expected {list(wanted.dims)}")
    shape = tuple(tensor.shape)
    batched = len(shape) == len(wanted.dims) + 1
    if batched and shape[0] > 1 and _fits(shape[1:], wanted.dims):
        raise InvalidField(
            wanted.name,
            f"batch size {shape[0]} is not supported: send one request per image, the server batches concurrent requests",
        )
    own = shape[1:] if batched else shape
    if not _fits(own, wanted.dims) or (batched and shape[0] != 1):
        raise InvalidField(wanted.name, f"shape is {shown(list(shape))}, expected {list(wanted.dims)}")
    return own, batched


def _fits(shape: tuple[int, ...], dims: tuple[int, ...]) -> bool:
    return len(shape) == len(dims) and all(has > 0 and wants in (-1, has) for has, wants in zip(shape, dims, strict=True))


def _typed(tensor: Any, count: int) -> Sequence[Any]:
    field = _TYPED[tensor.datatype]
    for other, values in tensor.contents.ListFields():
        if other.name != field:
            raise InvalidField(
                tensor.name, f"{tensor.datatype} is read from {field}, and {other.name} has {len(values)} elements"
            )
    elements: Sequence[Any] = getattr(tensor.contents, field)
    if len(elements) != count:
        raise InvalidField(tensor.name, f"{field} has {len(elements)} elements, the shape {list(tensor.shape)} has {count}")
    return _octets(tensor.name, elements) if tensor.datatype == "UINT8" else elements


def _octets(name: str, elements: Sequence[int]) -> bytes:
    try:
        # In parts, because each conversion holds the GIL.
        return b"".join(bytes(elements[at : at + _PART]) for at in range(0, len(elements), _PART))
    except ValueError:
        raise InvalidField(name, "an element is out of range for UINT8") from None


def _raw(name: str, datatype: str, raw: bytes, count: int) -> Sequence[Any]:
    if datatype == "BYTES":
        return _elements(name, raw, count)
    kind = np.dtype(_FIXED[datatype])
    if len(raw) != count * kind.itemsize:
        raise InvalidField(name, f"the data has {len(raw)} bytes, but {count} {datatype} elements take {count * kind.itemsize}")
    elements: Sequence[Any] = raw if datatype == "UINT8" else np.frombuffer(raw, kind).tolist()
    return elements


def _elements(name: str, raw: bytes, count: int) -> list[bytes]:
    """The elements of a BYTES tensor, each preceded by its length in four bytes, little-endian."""
    elements: list[bytes] = []
    at = 0
    while at < len(raw):
        body = at + _LENGTH.size
        end = body + _LENGTH.unpack_from(raw, at)[0] if body <= len(raw) else body
        if end > len(raw):
            raise InvalidField(
                name, f"the data ends within element {len(elements)}: each element must be preceded by its length in four bytes"
            )
        if len(elements) == count:
            raise InvalidField(name, f"the data has more than the {count} elements of the shape")
        elements.append(raw[body:end])
        at = end
    if len(elements) != count:
        raise InvalidField(name, f"the data has {len(elements)} elements, the shape has {count}")
    return elements


def _shortest(value: float) -> float:
    """The shortest decimal number equal to this FP32: 0.7 instead of 0.699999988, which would give one of ten steps less."""
    return float(str(np.float32(value)))


def write(response: Any, output: Output, values: Sequence[bytes] | Sequence[int], batched: bool) -> None:
    """Appends an output as raw contents to a ModelInferResponse, with a batch dimension if the input was `batched`."""
    tensor = response.outputs.add(name=output.name, datatype=output.datatype)
    tensor.shape.extend([1, len(values)] if batched else [len(values)])
    if output.datatype == "BYTES":
        parts = [part for value in values if isinstance(value, bytes) for part in (_LENGTH.pack(len(value)), value)]
        response.raw_output_contents.append(b"".join(parts))
    else:
        response.raw_output_contents.append(np.array(values, _FIXED[output.datatype]).tobytes())


def shown(value: object) -> str:
    """A caller's value as truncated ASCII text, safe in errors and logs."""
    text = ascii(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."

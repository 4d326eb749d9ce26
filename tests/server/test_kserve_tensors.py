"""KServe tensors: raw and typed contents are equivalent, and malformed ones are named."""

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from img2img_server.api.kserve import tensors
from img2img_server.api.kserve.tensors import Input, Output
from img2img_server.errors import InvalidField, NotSupported
from tritonclient.grpc import InferResult  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2 as pb

TEXT = Input("text", ("BYTES",))
NUMBER = Input("number", ("FP32", "FP64"))
COUNT = Input("count", ("INT64", "INT32"))
PIXELS = Input("pixels", ("UINT8",), (-1, -1, 3))
INPUTS = (TEXT, NUMBER, COUNT, PIXELS)


def made(*given: dict[str, Any], raw: list[bytes] | None = None) -> Any:
    request = pb.ModelInferRequest(raw_input_contents=raw or [])
    for one in given:
        contents = {name: one.pop(name) for name in list(one) if name.endswith("_contents")}
        tensor = request.inputs.add(**{"shape": [1], **one})
        if contents:
            tensor.contents.CopyFrom(pb.InferTensorContents(**contents))
    return request


def element(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


BOTH: list[tuple[str, str, dict[str, Any], bytes, Any]] = [
    ("text", "BYTES", {"bytes_contents": [b"a\0b"]}, element(b"a\0b"), b"a\0b"),
    ("text", "BYTES", {"bytes_contents": [b""]}, element(b""), b""),
    ("number", "FP32", {"fp32_contents": [0.7]}, struct.pack("<f", 0.7), 0.7),
    ("number", "FP64", {"fp64_contents": [0.7]}, struct.pack("<d", 0.7), 0.7),
    ("count", "INT64", {"int64_contents": [-(2**63)]}, struct.pack("<q", -(2**63)), -(2**63)),
    ("count", "INT32", {"int_contents": [-5]}, struct.pack("<i", -5), -5),
]


@pytest.mark.parametrize("shape", [[1], [1, 1]])
@pytest.mark.parametrize(("name", "datatype", "typed", "raw", "value"), BOTH)
def test_raw_and_typed_contents_are_equivalent(
    name: str, datatype: str, typed: dict[str, Any], raw: bytes, value: Any, shape: list[int]
) -> None:
    tensor = {"name": name, "datatype": datatype, "shape": shape}
    for request in (made({**tensor, **typed}), made(dict(tensor), raw=[raw])):
        found = tensors.read(request, INPUTS)
        assert found == {name: tensors.Given(value, batched=shape == [1, 1])}
        assert type(found[name].value) is type(value)


@pytest.mark.parametrize("batched", [False, True])
def test_pixels_keep_their_order(batched: bool) -> None:
    pixels = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [1, 2, 4, 3] if batched else [2, 4, 3]}
    typed = made({**tensor, "uint_contents": pixels.flatten().tolist()})
    for request in (made(dict(tensor), raw=[pixels.tobytes()]), typed):
        found = tensors.read(request, INPUTS)["pixels"]
        assert found.batched == batched
        assert np.array_equal(found.value, pixels)


def test_raw_contents_are_matched_to_their_inputs() -> None:
    request = made({"name": "count", "datatype": "INT64"}, {"name": "text", "datatype": "BYTES"}, raw=[bytes(8), element(b"a")])
    assert {name: given.value for name, given in tensors.read(request, INPUTS).items()} == {"count": 0, "text": b"a"}


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.decimals(min_value=0, max_value=30, places=3))
def test_decimal_sent_as_fp32_is_read_back_exactly(decimal: Any) -> None:
    """Steps are counted by multiplying with it and rounding down, so that the next lower number would be one less."""
    raw = np.array([float(decimal)], np.float32).tobytes()
    assert tensors.read(made({"name": "number", "datatype": "FP32"}, raw=[raw]), INPUTS)["number"].value == float(decimal)


TEXT_, COUNT_ = {"name": "text", "datatype": "BYTES"}, {"name": "count", "datatype": "INT64"}
PIXELS_ = {"name": "pixels", "datatype": "UINT8", "shape": [2, 2, 3]}
MALFORMED: dict[str, tuple[Any, str]] = {
    "a length without its bytes": (made(TEXT_, raw=[b"\x05\0\0\0abc"]), "text"),
    "half a length": (made(TEXT_, raw=[b"\x05\0"]), "text"),
    "a huge length": (made(TEXT_, raw=[b"\xff\xff\xff\xffabc"]), "text"),
    "two elements": (made(TEXT_, raw=[element(b"a") + element(b"b")]), "text"),
    "a text without a length": (made(TEXT_, raw=[b"a lake"]), "text"),
    "nothing": (made(TEXT_, raw=[b""]), "text"),
    "seven bytes of an INT64": (made(COUNT_, raw=[bytes(7)]), "count"),
    "nine bytes of an INT64": (made(COUNT_, raw=[bytes(9)]), "count"),
    "no contents at all": (made(COUNT_), "count"),
    "two numbers": (made({**COUNT_, "int64_contents": [1, 2]}), "count"),
    "contents of another type": (made({**COUNT_, "fp32_contents": [1.0]}), "count"),
    "contents of two types": (made({**COUNT_, "int64_contents": [1], "bytes_contents": [b"a"]}), "count"),
    "raw and typed contents": (made({**COUNT_, "int64_contents": [1]}, raw=[bytes(8)]), "count"),
    "more raw contents than inputs": (made(COUNT_, raw=[bytes(8), bytes(8)]), "raw_input_contents"),
    "fewer raw contents than inputs": (made(COUNT_, TEXT_, raw=[bytes(8)]), "raw_input_contents"),
    "an unknown datatype": (made({**COUNT_, "datatype": "FP16"}, raw=[bytes(2)]), "count"),
    "a scalar's shape": (made({**COUNT_, "shape": []}, raw=[bytes(8)]), "count"),
    "a negative shape": (made({**COUNT_, "shape": [-1]}, raw=[bytes(8)]), "count"),
    "a shape of three": (made({**COUNT_, "shape": [1, 1, 1]}, raw=[bytes(8)]), "count"),
    "a batch": (made({**COUNT_, "shape": [2, 1]}, raw=[bytes(16)]), "count"),
    "twice": (made(COUNT_, COUNT_, raw=[bytes(8), bytes(8)]), "count"),
    "an unknown name": (made({**COUNT_, "name": "nope"}, raw=[bytes(8)]), "inputs"),
    "pixels of four channels": (made({**PIXELS_, "shape": [2, 2, 4]}, raw=[bytes(16)]), "pixels"),
    "pixels without rows": (made({**PIXELS_, "shape": [0, 2, 3]}, raw=[b""]), "pixels"),
    "more pixels than there are": (made({**PIXELS_, "shape": [2**31, 2**31, 3]}, raw=[bytes(12)]), "pixels"),
    "a pixel above 255": (made({**PIXELS_, "uint_contents": [0] * 11 + [256]}), "pixels"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_tensors_are_named(name: str) -> None:
    request, field = MALFORMED[name]
    with pytest.raises(InvalidField) as caught:
        tensors.read(request, INPUTS)
    assert caught.value.field == field


@pytest.mark.parametrize(("parameter", "error"), [("binary_data_size", InvalidField), ("shared_memory_region", NotSupported)])
def test_a_parameter_of_an_input_is_refused(parameter: str, error: type[Exception]) -> None:
    request = made(COUNT_, raw=[bytes(8)])
    request.inputs[0].parameters[parameter].string_param = "a"
    with pytest.raises(error, match="count: "):
        tensors.read(request, INPUTS)


@pytest.mark.parametrize("batched", [False, True])
def test_tritons_client_reads_our_outputs(batched: bool) -> None:
    response = pb.ModelInferResponse()
    tensors.write(response, Output("images", "BYTES"), [b"a\0", b"", b"bcd"], batched)
    tensors.write(response, Output("seed", "INT64"), [2**63 - 1, 0], batched)
    result = InferResult(response)
    images, seeds = [b"a\0", b"", b"bcd"], [2**63 - 1, 0]
    assert result.as_numpy("images").tolist() == ([images] if batched else images)
    assert result.as_numpy("seed").tolist() == ([seeds] if batched else seeds)

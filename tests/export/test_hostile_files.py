"""Files of a model that are made to break what reads them: refused in a sentence that names the file, nothing allocated."""

import struct
from pathlib import Path

import pytest
from img2img_export.errors import ExportError
from img2img_export.scaled import refuse_other_quantization
from img2img_export.texts import read_json
from img2img_export.weights_file import read_header
from img2img_server.errors import BundleError
from img2img_server.pipelines.components import read_index
from img2img_server.pipelines.foreign import refuse_foreign_parts

DEEP = b"[" * 100_000
HEADERS = {
    "nested too deeply": DEEP,
    "metadata nested too deeply": b'{"__metadata__":' + DEEP,
    "a list": b"[]",
    "a tensor that is a number": b'{"a":1}',
    "no offsets": b'{"a":{"dtype":"F16","shape":[2]}}',
    "offsets that are text": b'{"a":{"dtype":"F16","shape":[2],"data_offsets":["0","4"]}}',
    "offsets beyond the file": b'{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,9223372036854775807]}}',
    "an offset that is no number": b'{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,NaN]}}',
    "a number of 5000 digits": b'{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,' + b"9" * 5000 + b"]}}",
    "a shape that is a number": b'{"a":{"dtype":"F16","shape":4,"data_offsets":[0,0]}}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_headers_of_weights_that_lie_are_refused(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ExportError, match=str(path)):
        read_header(path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 200 * 2**20])
def test_headers_longer_than_their_file_are_refused_before_they_are_read(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ExportError, match="damaged"):
        read_header(path)


def test_metadata_nested_too_deeply_is_refused() -> None:
    with pytest.raises(ExportError, match="quantized"):
        refuse_other_quantization("it", {}, {"_quantization_metadata": DEEP.decode()})


def test_json_nested_too_deeply_is_damaged_wherever_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model_index.json"
    path.write_bytes(DEEP)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(path)
    with pytest.raises(BundleError, match=str(path)):
        read_index(tmp_path)
    with pytest.raises(BundleError, match=str(path)):
        refuse_foreign_parts(path)

"""Files of a model that are made to break what reads them: refused in a sentence that names the file, nothing allocated."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from img2img_export.build import export_model
from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.read.scaled import refuse_other_quantization
from img2img_export.read.source import resolve
from img2img_export.read.texts import read_json
from img2img_export.read.weights_file import read_header
from img2img_server.bundle.unsafe_files import refuse_unsafe_parts
from img2img_server.errors import BundleError
from img2img_server.runtime.onnx.components import read_index

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
    "a huge shape of no bytes": b'{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,0]}}',
    "a negative size": b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}',
    "a size with a fraction": b'{"a":{"dtype":"F32","shape":[0.0],"data_offsets":[0,0]}}',
    "a size of many digits": b'{"a":{"dtype":"F32","shape":[0,' + b"9" * 4000 + b'],"data_offsets":[0,0]}}',
    "an unknown type": b'{"a":{"dtype":"EVIL","shape":[0],"data_offsets":[0,0]}}',
    "backwards": b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[4,0]}}',
    "notes that are no text": b'{"__metadata__":{"a":[1]}}',
    "many tensors": b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(100_001)) + b"}",
    "many sizes": b'{"a":{"dtype":"F32","shape":[' + b"1," * 2_100_000 + b'0],"data_offsets":[0,0]}}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_false_weight_headers_are_refused(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ExportError, match=str(path)):
        read_header(path)


@pytest.mark.parametrize(("component", "field", "value"), [("unet", "block_out_channels", 8), ("vae", "scaling_factor", "x")])
def test_a_wrong_field_of_a_configuration_is_named(
    component: str, field: str, value: Any, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    model = Path(shutil.copytree(tiny_model("sd1"), tmp_path / "model"))
    path = model / component / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ExportError, match=rf"^{path}: the field '{field}' is {value!r}, not "):
        resolve(ExportOptions(source=str(model), output=tmp_path / "out"), Progress())


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 200 * 2**20])
def test_headers_longer_than_their_file_are_refused_before_they_are_read(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ExportError, match="damaged"):
        read_header(path)


def test_metadata_nested_too_deeply_is_refused() -> None:
    with pytest.raises(ExportError, match="quantized"):
        refuse_other_quantization("it", {}, {"_quantization_metadata": DEEP.decode()})


def test_every_reader_refuses_json_nested_too_deeply(tmp_path: Path) -> None:
    path = tmp_path / "model_index.json"
    path.write_bytes(DEEP)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(path)
    with pytest.raises(BundleError, match=str(path)):
        read_index(tmp_path)
    with pytest.raises(BundleError, match=str(path)):
        refuse_unsafe_parts(path)


@pytest.mark.parametrize("offsets", [((0, 4), (0, 4)), ((0, 4), (2, 6)), ((0, 4), (5, 9)), ((4, 8), (8, 12))])
def test_tensors_that_overlap_or_leave_gaps_are_refused(offsets: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    tensors = {str(place): {"dtype": "F32", "shape": [1], "data_offsets": place} for place in offsets}
    if len(tensors) == 1:
        tensors["again"] = next(iter(tensors.values()))
    header = json.dumps(tensors).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(max(end for _, end in offsets)))
    with pytest.raises(ExportError, match=f"{path} is damaged"):
        read_header(path)


@pytest.fixture
def model(tmp_path: Path, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a tiny model, to be changed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(tiny_model("sd1"), tmp_path / "model"))


def edit(path: Path, **keys: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def find(model: Path) -> None:
    resolve(ExportOptions(source=str(model), output=model.parent / "out"), Progress())


def outside(path: Path) -> None:
    """Puts a link to a file outside of the model in a file's place, with the same contents."""
    path.rename(path.parents[2] / "secret")
    path.symlink_to(path.parents[2] / "secret")


ODD: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a pipe": ("unet/more.json", os.mkfifo),
    "a device": ("tokenizer/special_tokens_map.json", lambda path: path.symlink_to("/dev/zero")),
    "a file of the kernel": ("tokenizer/added_tokens.json", lambda path: path.symlink_to("/proc/self/environ")),
    "a configuration outside": ("vae/config.json", outside),
    "a vocabulary outside": ("tokenizer/merges.txt", outside),
    "weights outside": ("vae/diffusion_pytorch_model.safetensors", outside),
    "a folder outside": ("vae/more", lambda path: path.symlink_to("/etc")),
    "a link to nothing": ("vae/more.json", lambda path: path.symlink_to("nothing")),
}


@pytest.mark.parametrize(("name", "make"), ODD.values(), ids=ODD)
def test_a_model_with_pipes_devices_or_links_outside_is_refused(name: str, make: Callable[[Path], object], model: Path) -> None:
    make(model / name)
    with pytest.raises(ExportError, match=str(model / name)):
        find(model)


def test_symlinks_within_a_model_and_the_hub_cache_are_accepted(model: Path) -> None:
    (model / "vae" / "config.json").rename(model / "config-of-vae.json")
    (model / "vae" / "config.json").symlink_to("../config-of-vae.json")
    (model.parent / "link").symlink_to(model)
    find(model.parent / "link")
    repository = model.parent / "models--acme--m"
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in model.rglob("*") if path.is_file() and not path.is_symlink())):
        path.rename(repository / "blobs" / str(number))
        path.symlink_to(repository / "blobs" / str(number))
    (repository / "snapshots").mkdir()
    snapshot = model.rename(repository / "snapshots" / "main")
    find(snapshot)
    (snapshot / "unet" / "config.json").unlink()
    (model.parent / "secret").write_text("{}")
    (snapshot / "unet" / "config.json").symlink_to(model.parent / "secret")
    with pytest.raises(ExportError, match=r"leads out of"):
        find(snapshot)


def test_hard_linked_files_are_not_changed(model: Path) -> None:
    """An export reads such a file, and writes beside it: a size as a list is written as a number."""
    edit(model / "unet" / "config.json", sample_size=[8, 8])
    kept = model.parent / "kept.json"
    kept.hardlink_to(model / "unet" / "config.json")
    before = kept.read_bytes()
    edit(model / "text_encoder" / "config.json", hidden_size=48)
    with pytest.raises(ExportError):
        export_model(ExportOptions(source=str(model), output=model.parent / "out", backend="torch"))
    assert kept.read_bytes() == before
    assert kept.samefile(model / "unet" / "config.json")


LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "channels": ("unet", {"block_out_channels": [8000, 16000]}),
    "layers": ("unet", {"layers_per_block": 10_000}),
    "layers of a VAE": ("vae", {"layers_per_block": 10_000}),
    "layers of a text encoder": ("text_encoder", {"num_hidden_layers": 10_000}),
    "words": ("text_encoder", {"vocab_size": 30_000_000}),
}


@pytest.mark.parametrize(("component", "changes"), LARGE.values(), ids=LARGE)
def test_a_configuration_larger_than_the_weights_is_refused(component: str, changes: dict[str, Any], model: Path) -> None:
    edit(model / component / "config.json", **changes)
    with pytest.raises(
        ExportError, match=rf"^{component} does not load: TooLarge: its config.json describes more (weights|parts)"
    ):
        export_model(ExportOptions(source=str(model), output=model.parent / "out", backend="torch"))
    assert not (model.parent / "out").exists()


def test_a_value_that_a_library_refuses_names_the_field(model: Path) -> None:
    edit(model / "text_encoder" / "config.json", hidden_act=0)
    with pytest.raises(ExportError, match=r"^text_encoder does not load: .*'hidden_act'"):
        export_model(ExportOptions(source=str(model), output=model.parent / "out", backend="torch"))


def test_bundle_rules_for_numbers_and_tokenizers_apply_to_sources(model: Path) -> None:
    """tests/server/test_hostile_models.py has the rules."""
    edit(model / "scheduler" / "scheduler_config.json", num_train_timesteps=2 * 10**9)
    with pytest.raises(ExportError, match=r"scheduler_config.json: .*num_train_timesteps"):
        find(model)
    edit(model / "scheduler" / "scheduler_config.json", num_train_timesteps=1000)
    find(model)
    table = model / "tokenizer" / "tokenizer.json"
    edit(table, padding={"strategy": {"Fixed": 200_000_000}})
    with pytest.raises(ExportError, match=f"{table} is refused: Fixed is 200000000"):
        find(model)
    table.write_bytes(b"{" + b'"a":1,' * 12_000_000 + b'"a":1}')
    with pytest.raises(ExportError, match=f"{table} "):
        find(model)

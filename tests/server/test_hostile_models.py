"""Models crafted to exhaust memory, to hang a parser or to reach files outside are refused with an error that names the file.
Real models pass."""

import base64
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import covering
from img2img_server.bundle import files
from img2img_server.bundle.manifest import MANIFEST_NAME, Manifest, Source, Verification, read_manifest
from img2img_server.bundle.tokenizer_files import is_slow
from img2img_server.bundle.unsafe_files import refuse_unsafe, refuse_unsafe_config
from img2img_server.errors import BundleError
from img2img_server.runtime import loader
from img2img_server.runtime.common.weight_budget import TooLarge, within
from img2img_server.runtime.execution import Execution
from safetensors.torch import save_file

ENTRIES: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "pipe that is no configuration": lambda path: os.mkfifo(path.with_suffix(".dat")),
    "link to a pipe": lambda path: path.symlink_to(_pipe(path.parents[2] / "outer")),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link outside": lambda path: path.symlink_to(_written(path.parents[2] / "secret.json", b"{}")),
    "relative link outside": lambda path: path.symlink_to(
        Path("..", "..", _written(path.parents[2] / "secret.json", b"{}").name)
    ),
    "folder outside": lambda path: path.symlink_to(path.parents[2]),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "circle": lambda path: path.symlink_to(path.name),
    "a kernel's file": lambda path: path.symlink_to("/proc/self/environ"),
}


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("make", ENTRIES.values(), ids=ENTRIES)
def test_bundle_with_special_or_outside_files_is_refused(make: Callable[[Path], object], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    _written(bundle / "unet" / "config.json", b"{}")
    (bundle / "vae").symlink_to("unet")
    (bundle / "unet" / "up").symlink_to("..")
    (bundle / "same.json").hardlink_to(bundle / "unet" / "config.json")
    refuse_unsafe(bundle)
    make(bundle / "unet" / "odd.json")
    with pytest.raises(BundleError, match=rf"{bundle}/(unet|vae)/odd\.(json|dat) "):
        refuse_unsafe(bundle)


def test_a_model_of_too_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_FILES", 3)
    for number in range(3):
        _written(tmp_path / f"{number}.json", b"{}")
    refuse_unsafe(tmp_path)
    _written(tmp_path / "last.json", b"{}")
    with pytest.raises(BundleError, match="more than 3 files"):
        refuse_unsafe(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors.index.json", "tokenizer.json", "vocab.json", "merges.txt", "spiece.model",
     "chat_template.jinja", "added_tokens.json", "tokenizer.4.0.0.json"],
)  # fmt: skip
def test_a_file_of_50_gigabytes_is_refused_unread(name: str, tmp_path: Path) -> None:
    """It is a sparse file, which takes no disk space."""
    with (tmp_path / name).open("wb") as file:
        file.truncate(50 * 2**30)
    with pytest.raises(BundleError, match=name):
        refuse_unsafe(tmp_path)


def test_manifest_that_is_a_pipe_or_oversized_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MANIFEST_NAME)
    with pytest.raises(BundleError, match="not a regular file"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST_NAME).unlink()
    with (tmp_path / MANIFEST_NAME).open("wb") as file:
        file.truncate(50 * 2**30)
    with pytest.raises(BundleError, match="the maximum is 8388608"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("data", [b"[" + b"1," * 600_000 + b"1]", b"[" * 600_000, b"[" + b"{}," * 600_000 + b"{}]"])
def test_json_with_too_many_values_is_refused(data: bytes, tmp_path: Path) -> None:
    assert len(data) < files.MOST_CONFIGURATION
    with pytest.raises(ValueError, match="more than 500000 values"):
        files.read_json(_written(tmp_path / "config.json", data))


PLAIN: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": {
        "type": "Sequence",
        "normalizers": [{"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}],
    },
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"'s|[\p{L}]+|[\p{N}]"}, "behavior": "Removed", "invert": True},
    "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
}
CHARSMAP = struct.pack("<I", 4) + bytes(4)
TOKENIZERS: dict[str, dict[str, Any]] = {
    "added tokens": {"added_tokens": [{}] * 40_000},
    "words": {"model": {"vocab": {str(number): number for number in range(2**20 + 1)}}},
    "words in a list": {"model": {"vocab": [0] * (2**20 + 1)}},
    "merges": {"model": {"merges": [""] * (2**21 + 1)}},
    "a regular expression": {"pre_tokenizer": {"pattern": {"Regex": "(a+)+b"}}},
    "a regular expression in a sequence": {"normalizer": {"normalizers": [{"pattern": {"Regex": r"((\w|\s)*)*:"}}]}},
    "a regular expression of a decoder": {"decoder": {"decoders": [{"pattern": {"Regex": "(?:a|a)*b"}}]}},
    "a long replacement": {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}},
    "replacements of replacements": {"normalizer": {"normalizers": [{"type": "Replace", "content": "a" * 60}] * 4}},
    "a long prefix": {"normalizer": {"type": "Prepend", "prepend": "a" * 50_000_000}},
    "fixed padding": {"padding": {"strategy": {"Fixed": 200_000_000}}},
    "padding to multiples": {"padding": {"strategy": "BatchLongest", "pad_to_multiple_of": 2**40}},
    "a template": {"post_processor": {"single": [{"SpecialToken": {"id": "x", "type_id": 0}}] * 100_000}},
    "a map of characters": {"normalizer": {"precompiled_charsmap": base64.b64encode(CHARSMAP + b"x" * 10**6 + b"\0").decode()}},
    "a map that is no base64": {"normalizer": {"precompiled_charsmap": "*"}},
}


@covering(name=["tokenizer.json", "tokenizer.4.0.0.json", "Tokenizer.json"], kind=TOKENIZERS)
def test_too_expensive_tokenizer_is_refused(kind: str, name: str, tmp_path: Path) -> None:
    path = _written(tmp_path / name, json.dumps({**PLAIN, **TOKENIZERS[kind]}).encode())
    with pytest.raises(BundleError, match=str(path)):
        refuse_unsafe_config(path)


@pytest.mark.parametrize("table", ["[" * 100_000, "[]", "", "3"])
def test_malformed_tokenizer_is_refused(table: str, tmp_path: Path) -> None:
    path = _written(tmp_path / "tokenizer.json", table.encode())
    with pytest.raises(BundleError, match=str(path)):
        refuse_unsafe_config(path)


def test_merges_of_too_many_lines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="more than 1048576 lines"):
        refuse_unsafe_config(_written(tmp_path / "merges.txt", b"a b\n" * (2**20 + 1)))


def test_a_plain_tokenizer_passes(tmp_path: Path) -> None:
    good = base64.b64encode(CHARSMAP + "ﷺ".encode() * 5 + b"\0").decode()
    for changes in ({}, {"normalizer": {"precompiled_charsmap": good}}, {"padding": {"strategy": {"Fixed": 77}}}):
        refuse_unsafe_config(_written(tmp_path / "tokenizer.json", json.dumps({**PLAIN, **changes}).encode()))


GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CLIP = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@pytest.mark.parametrize("pattern", [GPT4O, QWEN, CLIP, r"\s+", " {2,}", r"[()*+]+", r"\)+", "[[:space:]]+x"])
def test_regular_expressions_of_real_tokenizers_are_not_slow(pattern: str) -> None:
    assert not is_slow(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|a)*b", "(?:a|aa)+$", "(a*){9}b", r"(a)\1", r"(?<x>a+)\k<x>", r"(?<x>a\g<x>?)", "a*a*a*a*a*b", "x" * 3000,
     "(?x)(a+)#c\n+b", "(?i-mx:(a+) + b)", "(?~abc)", r"(\\)+", "((a))+?", "(a)++"],
)  # fmt: skip
def test_regular_expressions_with_catastrophic_backtracking_are_slow(pattern: str) -> None:
    assert is_slow(pattern)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_train_timesteps", 2 * 10**9), ("num_train_timesteps", 100_001), ("model_max_length", 10**9), ("max_length", 2**20 + 1),
     ("hidden_size", 2**25 + 1), ("hidden_size", -(10**12)), ("block_out_channels", [8, 10**12]), ("nested", {"size": 10**10})],
)  # fmt: skip
def test_implausibly_large_sizes_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    path = _written(tmp_path / "config.json", json.dumps({key: value}).encode())
    with pytest.raises(BundleError, match="larger than any size"):
        refuse_unsafe_config(path)


def test_plausible_sizes_pass(tmp_path: Path) -> None:
    numbers = {
        "model_max_length": 10**30,
        "num_train_timesteps": 1000,
        "rope_theta": 5_000_000,
        "longest_edge": 25_165_824,
        "x": -1e300,
    }
    refuse_unsafe_config(_written(tmp_path / "tokenizer_config.json", json.dumps(numbers).encode()))


class Layers(torch.nn.Module):
    """A module of so many layers, which counts the layers that were created."""

    made = 0

    def __init__(self, layers: int, size: int = 1) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for _ in range(layers):
            self.layers.append(torch.nn.Linear(size, size))
            Layers.made += 1


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file({"a": torch.zeros(4, 4), "b": torch.zeros(4)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_model_construction_is_bounded_by_the_weight_files(weights: Path) -> None:
    Layers.made = 0
    with pytest.raises(TooLarge, match="more parts"), within([weights]):
        Layers(10**9)
    assert 500 < Layers.made < 5000
    with pytest.raises(TooLarge, match="more weights"), within([weights]):
        Layers(1, 5000)
    with pytest.raises(TooLarge, match="more weights"), within([weights]):
        Layers(1, 10**9)
    with within([weights]):
        Layers(100)
    Layers(1, 5000)


def test_other_errors_pass_through_unchanged(weights: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^another$"), within([weights]):
        raise RuntimeError("another")


LYING: dict[str, dict[str, Any]] = {
    "no bytes": {"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 0]}},
    "overlapping": {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"},
    "a gap": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    "a negative size": {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    "another type": {"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 4]}},
    "an unknown type": {"a": {"dtype": "EVIL", "shape": [1], "data_offsets": [0, 4]}},
    "backwards": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    "many tensors": {str(number): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(100_001)},
}


@pytest.mark.parametrize("header", LYING.values(), ids=LYING)
def test_weights_with_a_false_header_are_refused(header: dict[str, Any], tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    path = _written(tmp_path / "model.safetensors", struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(ValueError, match=str(path)), within([path]):
        pass


CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "channels": ("unet", {"block_out_channels": [8000, 16000]}),
    "terabytes of channels": ("unet", {"block_out_channels": [160_000, 320_000]}),
    "layers": ("unet", {"layers_per_block": 10_000}),
    "layers of a transformer": ("unet", {"transformer_layers_per_block": 10_000}),
    "layers of a VAE": ("vae", {"layers_per_block": 10_000}),
    "layers of a text encoder": ("text_encoder", {"num_hidden_layers": 10_000}),
    "words": ("text_encoder", {"vocab_size": 30_000_000}),
    "positions": ("text_encoder", {"max_position_embeddings": 30_000_000}),
    "a hidden size": ("text_encoder", {"hidden_size": 1_000_000}),
}


@pytest.mark.parametrize("backend", ["torch", "hybrid"])
@pytest.mark.parametrize(("component", "changes"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_configuration_larger_than_the_weights_does_not_load(
    component: str, changes: dict[str, Any], backend: Any, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    with pytest.raises(BundleError, match=r"does not load: its config.json describes more (weights|parts) than") as caught:
        _load(tiny_model("sd1"), tmp_path / "bundle", component, changes, backend)
    assert str(tmp_path / "bundle") in str(caught.value)


@pytest.mark.parametrize("backend", ["torch", "hybrid"])
@pytest.mark.parametrize(("component", "field", "value"), [("text_encoder", "hidden_act", 0), ("unet", "norm_num_groups", 0)])
def test_a_value_that_a_library_refuses_is_an_error_of_the_bundle(
    component: str, field: str, value: Any, backend: Any, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    """transformers refuses other types with errors of its own, and PyTorch divides by zero."""
    with pytest.raises(BundleError, match="does not load: "):
        _load(tiny_model("sd1"), tmp_path / "bundle", component, {field: value}, backend)


def _load(model: Path, bundle: Path, component: str, changes: dict[str, Any], backend: Any) -> None:
    """Loads a copy of a model as a bundle without graphs, with these changes of a component's configuration."""
    shutil.copytree(model, bundle)
    path = bundle / component / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    manifest = Manifest(
        source=Source(repo_id="tiny"), pipeline_class="StableDiffusionImg2ImgPipeline", family="stable-diffusion",
        backend=backend, components=(), files={}, tools={}, verification=Verification(passed=True),
    )  # fmt: skip
    loader.load_pipeline(bundle, manifest, Execution(provider="cpu", arithmetic="fp32", threads=1))

"""Accepted sources, the files that are read of them, and the digest that covers exactly those files."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions
from img2img_export.progress import Advance, Progress
from img2img_export.read import digests, source
from img2img_export.read.source import Checkpoint, resolve

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}
TEXTS = ["unet/config.json", "tokenizer/vocab.json"]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
NO_WEIGHTS = (2).to_bytes(8, "little") + b"{}"
"""A safetensors file without tensors."""
PARTS = ("model.diffusion_model.x", "first_stage_model.x", "cond_stage_model.x")
"""A tensor of each part that a whole model in one file has."""


pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The files of a checkpoint; their contents are of no model."""
    return write(tmp_path / "checkpoint", [*TEXTS, WEIGHTS])


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """One file of weights, of no model either."""
    safetensors.torch.save_file({name: torch.ones(2) for name in PARTS}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def write(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(NO_WEIGHTS if name.endswith(".safetensors") else b"{}")
    (root / "model_index.json").write_text(json.dumps(INDEX))
    return root


def find(path: Path | str, **options: object) -> Checkpoint:
    return resolve(ExportOptions(source=str(path), output=Path("unused"), **options), Progress())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/directory", "neither"),
        ("no/such.safetensors", "is not a file"),
        ("model.ckpt", "pickles can run code"),
        ("model.gguf", "not a .safetensors file"),
        ("damaged.safetensors", "is a pickle"),
        ("empty.safetensors", "damaged"),
        (".", "no model_index.json"),
    ],
)
def test_invalid_checkpoint_is_refused_in_one_line(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("model.ckpt", "model.gguf", "empty.safetensors"):
        (tmp_path / file).touch()
    (tmp_path / "damaged.safetensors").write_bytes(b"\x80\x02}q\x00X\x05 a pickle")
    with pytest.raises(ExportError, match=message) as caught:
        find(name)
    assert "\n" not in str(caught.value)


def test_digest_depends_only_on_files_that_are_read(directory: Path) -> None:
    first = find(directory).source.digest
    (directory / "README.md").write_text("hello")
    assert find(directory).source.digest == first
    (directory / WEIGHTS).write_bytes((3).to_bytes(8, "little") + b"{ }")
    assert find(directory).source.digest != first


def test_checkpoint_tree_contains_only_files_that_are_read(directory: Path, tmp_path: Path) -> None:
    (directory / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    checkpoint = find(directory)
    checkpoint.link_into(tmp_path / "view")
    seen = {path.relative_to(tmp_path / "view").as_posix() for path in (tmp_path / "view").rglob("*") if path.is_file()}
    assert seen == set(checkpoint.files) == {"model_index.json", *TEXTS, WEIGHTS}


def test_directories_of_graphs_are_recognized(tmp_path: Path) -> None:
    names = [*TEXTS, "unet/model.onnx", "unet/model.onnx_data", "vae_decoder/model.onnx"]
    found = find(write(tmp_path / "graphs", names))
    assert found.kind == "onnx"
    assert found.files == tuple(sorted(["model_index.json", *names]))


def test_the_digest_of_a_single_file_covers_its_template(single: Path, directory: Path) -> None:
    found = find(single, config=str(directory))
    assert (found.kind, found.weights, found.source.path) == ("single-file", single, str(single))
    assert found.files == tuple(sorted(["model_index.json", *TEXTS]))
    assert found.size > single.stat().st_size
    (directory / WEIGHTS).write_bytes(b"the template's own weights are not read")
    assert find(single, config=str(directory)) == found
    (directory / "unet" / "config.json").write_text('{"a": 1}')
    changed = find(single, config=str(directory)).source.digest
    safetensors.torch.save_file({name: torch.zeros(2) for name in PARTS}, single)
    assert len({found.source.digest, changed, find(single, config=str(directory)).source.digest}) == 3


@pytest.mark.parametrize("option", [{"variant": "fp16"}, {"revision": "main"}, {"allow_patterns": ("unet/*",)}])
def test_selection_options_are_refused_for_a_single_file(option: dict[str, object], single: Path, directory: Path) -> None:
    with pytest.raises(ExportError, match="is a single file"):
        find(single, config=str(directory), **option)


def test_truncated_single_file_is_refused(single: Path, directory: Path) -> None:
    single.write_bytes(single.read_bytes()[:-1])
    with pytest.raises(ExportError, match="truncated"):
        find(single, config=str(directory))


def test_config_option_is_refused_for_a_directory(directory: Path) -> None:
    with pytest.raises(ExportError, match="--config is only for a single file"):
        find(directory, config=str(directory))


def test_local_sources_are_resolved_without_heavy_imports(single: Path, directory: Path) -> None:
    code = """
import sys
for name in ("torch", "diffusers", "transformers", "optimum", "onnx", "onnxruntime", "huggingface_hub", "safetensors", "numpy"):
    sys.modules[name] = None
from pathlib import Path
from img2img_export.read import lora
from img2img_export.options import ExportOptions, LoraFile
from img2img_export.progress import Advance, Progress
from img2img_export.read.source import resolve
for source, config in ((sys.argv[2], None), (sys.argv[1], sys.argv[2])):
    resolve(ExportOptions(source=source, output=Path("unused"), config=config), Progress())
lora.records([LoraFile(Path(sys.argv[1]))])
"""
    subprocess.run([sys.executable, "-c", code, str(single), str(directory)], check=True)


def test_unchanged_files_are_not_hashed_again(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[str] = []

    class Recorder(Progress):
        @contextmanager
        def task(self, label: str, total: int, unit: str = "B") -> Iterator[Advance]:
            tasks.append(label)
            yield lambda count: None

    def later() -> int:
        return time.time_ns() + 10 * 10**9

    monkeypatch.setattr(source, "Digests", lambda: digests.Digests(tmp_path / "digests.json", later))
    monkeypatch.setattr(digests, "_PROGRESS_BYTES", 1)
    options = ExportOptions(source=str(directory), output=Path("unused"))
    assert resolve(options, Recorder()) == resolve(options, Recorder())
    assert tasks == ["hashing checkpoint"]

"""Downloading from a hub: a stand-in server on this machine, and the exporter in a process of its own, with its own cache."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from fake_hub import COMMIT, Hub, serve
from img2img_export.read import hub as client

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}
FILES = {
    "model_index.json": json.dumps(INDEX).encode(),
    "README.md": b"a model",
    "v1.ckpt": b"a pickle",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.bin": b"a pickle",
    "unet/diffusion_pytorch_model.safetensors": (2).to_bytes(8, "little") + b"{}",
    "unet/diffusion_pytorch_model.fp16.safetensors": (3).to_bytes(8, "little") + b"{ }",
    "tokenizer/vocab.json": b'{"a": 0}',
}

_RESOLVE = """
import contextlib, dataclasses, json, sys
from pathlib import Path
for name in json.loads(sys.argv[2]):
    sys.modules[name] = None
from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.read.source import resolve

tasks = []

class Recorder(Progress):
    @contextlib.contextmanager
    def task(self, label, total, unit="B"):
        counts = []
        try:
            yield counts.append
        finally:
            tasks.append([label, total, sum(counts)])

arguments = json.loads(sys.argv[1])
try:
    checkpoint = resolve(ExportOptions(output=Path("unused"), **arguments), Recorder())
except ExportError as error:
    print(json.dumps({"error": str(error), "tasks": tasks}))
else:
    contents = {name: (checkpoint.directory / name).read_text() for name in checkpoint.files}
    print(json.dumps({"files": contents, "source": dataclasses.asdict(checkpoint.source), "tasks": tasks}))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(Hub(dict(FILES))) as served:
        yield served


def resolve(
    hub: Hub, home: Path, offline: bool = False, token: str = "", without: tuple[str, ...] = (), **arguments: object
) -> dict[str, Any]:
    """Resolves in a process of its own, with its own caches and without the modules `without`."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    environment |= {"HF_HUB_OFFLINE": str(int(offline)), "XDG_CACHE_HOME": str(home / "cache")}
    arguments = {"source": "someone/model", **arguments}
    command = [sys.executable, "-c", _RESOLVE, json.dumps(arguments), json.dumps(without)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def test_only_needed_files_are_downloaded_and_the_cache_works_offline(hub: Hub, tmp_path: Path) -> None:
    found = resolve(hub, tmp_path)
    assert found["files"] == {
        "model_index.json": json.dumps(INDEX),
        "tokenizer/vocab.json": '{"a": 0}',
        "unet/config.json": "{}",
        "unet/diffusion_pytorch_model.safetensors": "\x02" + 7 * "\0" + "{}",
    }
    assert set(hub.fetched) == set(found["files"])
    assert found["source"]["repo_id"] == "someone/model"
    assert not found["source"]["path"]
    assert found["tasks"] == [["downloading someone/model", size(found), size(found)]]
    assert resolve(hub, tmp_path, offline=True) == {**found, "tasks": []}


def size(found: dict[str, Any]) -> int:
    return sum(len(text) for text in found["files"].values())


def test_variant_and_patterns_select_files(hub: Hub, tmp_path: Path) -> None:
    found = resolve(hub, tmp_path, variant="fp16", ignore_patterns=["tokenizer/*"], revision=COMMIT)
    assert (
        set(hub.fetched)
        == set(found["files"])
        == {
            "model_index.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.fp16.safetensors",
        }
    )
    assert found["source"]["revision"] == COMMIT


def test_pickled_weights_are_not_even_downloaded(hub: Hub, tmp_path: Path) -> None:
    for name in [name for name in hub.files if name.endswith(".safetensors")]:
        del hub.files[name]
    assert "pickled weights only" in str(resolve(hub, tmp_path)["error"])
    assert set(hub.fetched) <= {"model_index.json"}


def test_missing_hub_repository_is_one_line(hub: Hub, tmp_path: Path) -> None:
    error = str(resolve(hub, tmp_path, source="someone/else")["error"])
    assert error.startswith("someone/else is not a local directory and could not be downloaded")
    assert "\n" not in error


def test_unreachable_hub_is_one_line(tmp_path: Path) -> None:
    error = str(resolve(Hub({}, url="http://127.0.0.1:9"), tmp_path)["error"])
    assert error == "someone/model is not a local directory, and the hub cannot be reached at http://127.0.0.1:9"


def test_broken_connection_is_retried_and_the_download_resumed(hub: Hub, tmp_path: Path) -> None:
    chunk = 10 * 2**20  # as much as huggingface_hub writes at once
    length = 8 * 1_500_000
    header = json.dumps({"x": {"dtype": "U8", "shape": [length], "data_offsets": [0, length]}}).encode()
    whole = len(header).to_bytes(8, "little") + header + b"weights " * 1_500_000
    hub.files["unet/diffusion_pytorch_model.safetensors"] = whole
    hub.cut, hub.cuts = chunk + 1000, 1
    found = resolve(hub, tmp_path)
    assert hub.ranges == [f"bytes={chunk}-"]
    assert found["files"]["unet/diffusion_pytorch_model.safetensors"] == whole.decode()
    assert found["tasks"] == [["downloading someone/model", size(found), size(found)]]


def test_an_interrupted_download_resumes_with_the_incomplete_files(hub: Hub, tmp_path: Path) -> None:
    name, length = "unet/diffusion_pytorch_model.safetensors", 1000
    header = json.dumps({"x": {"dtype": "U8", "shape": [length], "data_offsets": [0, length]}}).encode()
    hub.files[name] = len(header).to_bytes(8, "little") + header + b"w" * length
    hub.cut, hub.cuts = 500, 1000
    broken = resolve(hub, tmp_path)
    assert broken["error"].startswith("the download of someone/model was interrupted (")
    assert "run the same command again to resume it" in broken["error"]
    assert "\n" not in broken["error"]
    before, hub.fetched, hub.cuts = set(hub.fetched), [], 0
    assert before > {name}
    found = resolve(hub, tmp_path)
    assert found["files"][name] == hub.files[name].decode()
    assert name in hub.fetched
    assert set(hub.fetched) == set(found["files"]) - (before - {name})


@pytest.mark.parametrize("name", ["blob.incomplete", "blob.4e5f6a7b.incomplete"])
def test_downloads_report_progress(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_WATCH_SECONDS", 0.001)
    told, counts = threading.Event(), []

    def advance(count: int) -> None:
        counts.append(count)
        if sum(counts) == 60:
            told.set()

    (tmp_path / "blob.0a1b2c3d.incomplete").write_bytes(b"a" * 90)  # a killed process left it
    with client._watched(tmp_path, "blob", 100, advance):
        (tmp_path / name).write_bytes(b"a" * 60)
        assert told.wait(120)
    assert sum(counts) == 100


@pytest.mark.parametrize("gated", [True, False])
def test_token_gives_access_to_private_and_gated_models(gated: bool, hub: Hub, tmp_path: Path) -> None:
    hub.token, hub.gated = "hf_secret", gated
    for token, status in (("", 401), ("hf_another", 403)):
        hub.status = status
        error = resolve(hub, tmp_path, token=token)["error"]
        assert error.startswith(f"the hub refuses access to someone/model ({status})")
        assert "HF_TOKEN" in error
        assert "\n" not in error
        assert "hf_another" not in error
    assert hub.fetched == []
    assert resolve(hub, tmp_path, token="hf_secret")["files"]


def test_template_of_a_single_file_downloads_only_text_files(hub: Hub, tmp_path: Path) -> None:
    """The configuration comes from the repository that diffusers names. The name is looked up once; later calls need neither
    diffusers nor torch."""
    names = ("model.diffusion_model.x", "first_stage_model.x", "cond_stage_model.x")
    safetensors.torch.save_file({name: torch.ones(2) for name in names}, tmp_path / "model.safetensors")
    hub.repo = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    found = resolve(hub, tmp_path, source=str(tmp_path / "model.safetensors"))
    assert set(hub.fetched) == set(found["files"]) == {"model_index.json", "unet/config.json", "tokenizer/vocab.json"}
    again = resolve(hub, tmp_path, source=str(tmp_path / "model.safetensors"), without=("torch", "diffusers", "safetensors"))
    assert again["source"] == found["source"]
    named = resolve(hub, tmp_path, source=str(tmp_path / "model.safetensors"), config=hub.repo, offline=True)
    assert named["source"] == found["source"]
    other = resolve(hub, tmp_path, source=str(tmp_path / "model.safetensors"), config="someone/else")
    assert "someone/else is not a local directory and could not be downloaded" in other["error"]

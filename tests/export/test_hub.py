"""Downloading from a hub: a stand-in server on this machine, and the exporter in a process of its own, with its own cache."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
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
    "unet/diffusion_pytorch_model.safetensors": b"weights",
    "unet/diffusion_pytorch_model.fp16.safetensors": b"half weights",
    "tokenizer/vocab.json": b'{"a": 0}',
}

_RESOLVE = """
import dataclasses, json, sys
from pathlib import Path
from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions
from img2img_export.source import resolve
arguments = json.loads(sys.argv[1])
try:
    checkpoint = resolve(ExportOptions(output=Path("unused"), **arguments), lambda line: None)
except ExportError as error:
    print(json.dumps({"error": str(error)}))
else:
    contents = {name: (checkpoint.directory / name).read_text() for name in checkpoint.files}
    print(json.dumps({"files": contents, "source": dataclasses.asdict(checkpoint.source)}))
"""


@dataclass
class Hub:
    """A hub with one repository, "someone/model", that answers what huggingface_hub asks for."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    fetched: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """Answers the three questions that huggingface_hub asks: about the repository, about a file, and for a file."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer(send=False)

    def do_GET(self) -> None:
        self.answer(send=True)

    def answer(self, send: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/someone/model"):
            siblings = [{"rfilename": name} for name in self.hub.files]
            self.reply(json.dumps({"id": "someone/model", "sha": COMMIT, "siblings": siblings}).encode(), send)
        elif path.startswith("/someone/model/resolve/") and (name := path.split("/", 5)[5]) in self.hub.files:
            self.hub.fetched += [name] if send else []
            self.reply(self.hub.files[name], send)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def reply(self, body: bytes, send: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if send:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    served = Hub()

    class BoundHandler(Handler):
        hub = served

    with ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler) as server:
        served.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield served
        server.shutdown()
        thread.join()


def resolve(hub: Hub, home: Path, offline: bool = False, **arguments: object) -> dict[str, dict[str, str]]:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment["HF_HUB_OFFLINE"] = str(int(offline))
    arguments = {"source": "someone/model", **arguments}
    output = subprocess.run(
        [sys.executable, "-c", _RESOLVE, json.dumps(arguments)], env=environment, capture_output=True, text=True, check=True
    ).stdout
    result: dict[str, dict[str, str]] = json.loads(output.splitlines()[-1])
    return result


def test_only_what_is_read_is_downloaded_and_offline_the_cache_serves(hub: Hub, tmp_path: Path) -> None:
    found = resolve(hub, tmp_path)
    assert found["files"] == {
        "model_index.json": json.dumps(INDEX),
        "tokenizer/vocab.json": '{"a": 0}',
        "unet/config.json": "{}",
        "unet/diffusion_pytorch_model.safetensors": "weights",
    }
    assert set(hub.fetched) == set(found["files"])
    assert found["source"]["repo_id"] == "someone/model"
    assert not found["source"]["path"]
    assert resolve(hub, tmp_path, offline=True) == found


def test_variant_and_patterns_choose(hub: Hub, tmp_path: Path) -> None:
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


def test_what_the_hub_lacks_is_one_line(hub: Hub, tmp_path: Path) -> None:
    error = str(resolve(hub, tmp_path, source="someone/else")["error"])
    assert error.startswith("someone/else could not be downloaded")
    assert "\n" not in error


def test_a_hub_out_of_reach_is_one_line(tmp_path: Path) -> None:
    error = str(resolve(Hub("http://127.0.0.1:9"), tmp_path)["error"])
    assert error == "someone/model is no directory here, and the hub cannot be reached at http://127.0.0.1:9"

"""The code that LitServe's and BentoML's servers share: both serve diffusers over HTTP and batch whole requests.

A request is {"messages": ["..."]} with the contract's TransformRequest in base64, a response a list with the image's file in
base64: the same bytes as over gRPC, in JSON as in both libraries' documentation.
"""

import base64
import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from img2img.v1.image_to_image_pb2 import TransformRequest

from bench_peers.batching import settings
from bench_peers.common import Arguments, Device, encode, load_pytorch, read, write_port

MAX_BATCH = 16
"""The maximum requests of a batch."""
PATIENCE = 0.05
"""Seconds to wait for a batch: LitServe's documentation has this value."""


def _has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return any(name in flags for name in ("avx512_bf16", "amx_bf16"))


class BatchPipeline:
    """A warm pipeline that makes the images of a batch: in one call for each of the settings among its requests."""

    def __init__(self, model: Path) -> None:
        self._device = Device(lambda: load_pytorch(model, _has_bfloat16()))
        self._device.load()

    def make(self, messages: Sequence[str]) -> list[str]:
        """The images' files, in base64, of TransformRequests in base64."""
        arguments = [read(TransformRequest.FromString(base64.b64decode(message))) for message in messages]
        groups: dict[object, list[int]] = {}
        for index, each in enumerate(arguments):
            groups.setdefault(settings(each), []).append(index)
        files = [""] * len(arguments)
        for group in groups.values():
            for index, file in zip(group, self._files([arguments[index] for index in group]), strict=True):
                files[index] = file
        return files

    def _files(self, batch: Sequence[Arguments]) -> list[str]:
        return [base64.b64encode(encode(image)).decode() for image in self._device.make_now(batch)]


def free_port() -> int:
    """A free port of the loopback interface."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def announce_later(path: str, port: int, port_file: Path) -> None:
    """Writes `port_file` once the server answers at `path`, from a thread."""
    threading.Thread(target=_announce, args=(f"http://127.0.0.1:{port}{path}", port, port_file), daemon=True).start()


def _announce(address: str, port: int, port_file: Path) -> None:
    while True:
        try:
            with urllib.request.urlopen(address, timeout=60):
                break
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    write_port(port, port_file)


def child_environment(model: Path) -> dict[str, str]:
    """The environment of a server process that imports a peer's module, which reads MODEL there."""
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, sys.path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "IMG2IMG_BENCH_MODEL": str(model), "BENTOML_DO_NOT_TRACK": "true"}

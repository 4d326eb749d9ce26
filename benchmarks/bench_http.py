"""The time that OpenAI's image API over HTTP adds to a request, compared with gRPC: the same edits of a fake model, in turns,
from one client.

Each side has one open connection. Over HTTP the client also makes the form and decodes the base64: both end with the file.
"""

import argparse
import base64
import contextlib
import http.client
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from PIL import Image
from rich.console import Console
from rich.table import Table
from soak_parts.stand_in import STEP_SECONDS, plant

ROOT = Path(__file__).resolve().parent.parent
_STEPS = 4
_BOUNDARY = "bench"
_START_SECONDS = 120


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the settings."""
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="pairs for each size (default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 512, 1024], metavar="PIXELS", help="sides of the image")


def run(arguments: argparse.Namespace) -> int:
    """Measures every size and prints a table: medians, in milliseconds. Returns 0."""
    table = Table("image", "file", "gRPC", "HTTP", "added, median of pairs", title="milliseconds a request")
    with _server() as (port, http_port), grpc.insecure_channel(f"127.0.0.1:{port}", _UNBOUNDED) as channel:
        transform = ImageToImageServiceStub(channel).Transform
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", http_port)) as connection:
            for side in arguments.sizes:
                data = _photo(side)
                ways = {"gRPC": _over_grpc(transform, data), "HTTP": _over_http(connection, data)}
                times = _measure(ways, arguments.requests)
                added = [over - under for over, under in zip(times["HTTP"], times["gRPC"], strict=True)]
                cells = (statistics.median(values) for values in (times["gRPC"], times["HTTP"], added))
                table.add_row(f"{side} x {side}", f"{len(data) / 1e3:.0f} KB", *(f"{cell:.2f}" for cell in cells))
    Console(width=120).print(table)
    return 0


_UNBOUNDED = [("grpc.max_receive_message_length", -1)]


def _measure(ways: dict[str, Callable[[], bytes]], count: int) -> dict[str, list[float]]:
    """Milliseconds of each way, in turns; every second turn the other one is first. All give the same image."""
    assert len({way() for way in ways.values()}) == 1, "both give the same file"
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(count):
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            begun = time.perf_counter()
            ways[name]()
            times[name].append((time.perf_counter() - begun) * 1e3)
    return times


def _over_grpc(transform: Any, data: bytes) -> Callable[[], bytes]:
    request = pb.TransformRequest(
        image=pb.ImageSource(data=data), prompt="a lake", num_inference_steps=_STEPS, strength=1, seed=7, output=_AS_SENT
    )

    def call() -> bytes:
        result: bytes = transform(request).images[0].data
        return result

    return call


_AS_SENT = pb.OutputOptions(format=pb.OUTPUT_FORMAT_JPEG)


def _over_http(connection: http.client.HTTPConnection, data: bytes) -> Callable[[], bytes]:
    fields = {
        "prompt": "a lake", "num_inference_steps": _STEPS, "strength": 1, "seed": 7, "size": "source", "output_format": "jpeg"
    }  # fmt: skip
    headers = {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}

    def call() -> bytes:
        parts = [f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{fields[name]}\r\n' for name in fields]
        head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="image.jpg"\r\n\r\n'
        body = "".join([*parts, head]).encode() + data + f"\r\n--{_BOUNDARY}--\r\n".encode()
        connection.request("POST", "/v1/images/edits", body, headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == 200, answer
        return base64.b64decode(answer["data"][0]["b64_json"])

    return call


def _photo(side: int) -> bytes:
    """A JPEG of as many bytes as a photo's of that size: noise, made smooth."""
    file = io.BytesIO()
    noise = Image.effect_noise((max(1, side // 4), max(1, side // 4)), 80).resize((side, side), Image.Resampling.BICUBIC)
    noise.convert("RGB").save(file, "JPEG", quality=90)
    return file.getvalue()


@contextlib.contextmanager
def _server() -> Iterator[tuple[int, int]]:
    """A server of a fake model, whose steps take no time, in a process of its own: its ports."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plant(folder / "models", "m")
        port_file, http_port = folder / "port", _free_port()
        command = [sys.executable, "-m", "soak_parts.stand_in", "--models", str(folder / "models"), "--port", "0"]
        command += ["--port-file", str(port_file), "--http-port", str(http_port), "--assets", "none", "--provenance", "none"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks"), STEP_SECONDS: "0"}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + _START_SECONDS
            while not port_file.exists():
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit("bench: the server did not start")
                time.sleep(0.01)
            yield int(port_file.read_text(encoding="ascii")), http_port
        finally:
            process.terminate()
            process.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

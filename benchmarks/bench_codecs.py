"""Cost of images: decoding and encoding in a codec process, compared with the same functions in this process; and whole requests
with PNG in and out, on a simulated device that takes no time, compared with an echo of the file.

CPU time is that of all threads of the processes, which means something on a busy machine, too.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import grpc
import psutil
from bench_load.servers import ServerProcess, ending
from img2img.v1.image_to_image_pb2 import ImageSource, TransformRequest
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_client import Client
from img2img_server import images
from img2img_server.codecs.jobs import Encode, LoadImage
from img2img_server.codecs.pool import Codecs, ImageMemory
from img2img_server.images import ImageLimits, SizeRule, WriteFormat
from img2img_server.support.call import Call, answering
from PIL import Image
from rich.console import Console
from rich.table import Table

_FORMATS: tuple[WriteFormat, ...] = ("PNG", "JPEG", "WEBP")
_QUALITY = 90
_MEMORY = 2**30
_Job = Callable[[], Awaitable[object]]


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    parser.add_argument("--side", type=int, default=512, metavar="PIXELS", help="side of the image (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=200, metavar="N", help="rounds; the median is reported (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures each format in both directions, and prints a table."""
    title = f"milliseconds per image of {arguments.side} pixels, medians of {arguments.rounds}, in turns"
    table = Table("", "in this process", "in a codec process", "added", title=title)
    for name, own, other in asyncio.run(_measure(arguments.side, arguments.rounds)):
        table.add_row(name, f"{own:.2f}", f"{other:.2f}", f"{other - own:.2f}")
    console = Console(width=100)
    console.print(table)
    title = f"milliseconds of a request with PNG in and out, {arguments.side} pixels, {arguments.rounds} each"
    table = Table("", "median", "fastest 10 %", "CPU: client", "server", "codecs", "all", title=title)
    for name, row in _requests(arguments.side, arguments.rounds):
        table.add_row(name, *(f"{value:.2f}" for value in row))
    console.print(table)
    return 0


async def _measure(side: int, rounds: int) -> list[tuple[str, float, float]]:
    """The name of each job, and its milliseconds in this process and in a codec process."""
    image = _image(side)
    codecs = Codecs(1, 1, ImageMemory(_MEMORY))
    await codecs.start()
    try:
        with answering(Call("bench", "bench", client="bench", traceparent="")):
            found = []
            for file_format in _FORMATS:
                data = images.encode(image, file_format, _QUALITY)
                for verb, own, other in (
                    ("decode", *_decoding(codecs, data, file_format)),
                    ("encode", *_encoding(codecs, image, file_format)),
                ):
                    found.append((f"{verb} {file_format}", *await _in_turns(own, other, rounds)))
            return found
    finally:
        await codecs.close()


def _decoding(codecs: Codecs, data: bytes, file_format: WriteFormat) -> tuple[_Job, _Job]:
    job = LoadImage("image.data", ImageLimits(), SizeRule(), 8, file_format)

    async def own() -> object:
        return job.run(data, lambda size, seconds: None)

    return own, lambda: codecs.load(data, job)


def _encoding(codecs: Codecs, image: Image.Image, file_format: WriteFormat) -> tuple[_Job, _Job]:
    job, pixels = Encode(image.size, file_format, _QUALITY), image.tobytes()

    async def own() -> object:
        return job.run(pixels, lambda size, seconds: None)

    return own, lambda: codecs.encode(image, file_format, _QUALITY)


def _image(side: int) -> Image.Image:
    """Smooth with noise, so that it compresses about like a photo."""
    return Image.blend(Image.linear_gradient("L").resize((side, side)), Image.effect_noise((side, side), 40), 0.3).convert("RGB")


def _requests(side: int, rounds: int) -> list[tuple[str, tuple[float, ...]]]:
    """Wall and CPU milliseconds of a request to the server, and of an echo."""
    data = io.BytesIO()
    _image(side).save(data, "PNG", compress_level=1)
    echoed = TransformRequest(image=ImageSource(data=data.getvalue()))
    with (
        _servers() as (server, echo),
        Client(server.target, timeout=60) as client,
        grpc.insecure_channel(echo.target, [("grpc.max_receive_message_length", -1)]) as channel,
    ):
        stub = ImageToImageServiceStub(channel)

        def transform() -> None:
            client.transform(data.getvalue(), prompt="", seed=1, num_inference_steps=1, strength=1.0)

        return [
            ("through server and client", _timed(transform, server.pid, rounds)),
            ("an echo by gRPC", _timed(lambda: stub.Transform(echoed), echo.pid, rounds)),
        ]


@contextlib.contextmanager
def _servers() -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """A server of a simulated device that takes no time, and an echo."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        simulated = Path(__file__).parent / "simulated_server.py"
        words = [json.dumps(each) for each in ({"engine": "local"}, {}, {"seconds": 0.0})]
        server = ServerProcess("server", [sys.executable, str(simulated), *words], folder)
        echo = ServerProcess("echo", [sys.executable, "-m", "bench_peers.echo"], folder)
        with ending([server, echo]):
            for process in (server, echo):
                process.spawn()
            for process in (server, echo):
                process.wait()
            yield server, echo


def _timed(call: Callable[[], object], server: int, rounds: int) -> tuple[float, ...]:
    """Milliseconds of a call: the median, the fastest tenth, and CPU time of this process, the server, its children, and all."""
    for _ in range(3):
        call()
    family = [[os.getpid()], [server], [child.pid for child in psutil.Process(server).children()]]
    before, walls = [_cpu(each) for each in family], []
    for _ in range(rounds):
        begun = time.perf_counter()
        call()
        walls.append((time.perf_counter() - begun) * 1e3)
    cpu = [(_cpu(each) - start) / rounds for each, start in zip(family, before, strict=True)]
    return statistics.median(walls), sorted(walls)[rounds // 10], *cpu, sum(cpu)


def _cpu(processes: list[int]) -> float:
    """Milliseconds of CPU time that the threads of these processes have used (Linux)."""
    threads = [thread for process in processes for thread in Path(f"/proc/{process}/task").iterdir()]
    return sum(int((thread / "schedstat").read_text(encoding="ascii").split()[0]) for thread in threads) / 1e6


async def _in_turns(own: _Job, other: _Job, rounds: int) -> tuple[float, float]:
    """The median milliseconds of both."""
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(rounds):
        for job, found in zip((own, other), seconds, strict=True):
            begun = time.perf_counter()
            await job()
            found.append(time.perf_counter() - begun)
    first, second = (statistics.median(each) * 1e3 for each in seconds)
    return first, second

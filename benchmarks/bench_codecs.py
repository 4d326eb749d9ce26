"""Overhead of a codec process: decoding and encoding an image there, compared with the same functions in this process."""

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable

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
    Console(width=100).print(table)
    return 0


async def _measure(side: int, rounds: int) -> list[tuple[str, float, float]]:
    """The name of each job, and its milliseconds in this process and in a codec process."""
    # Smooth with noise, so that it compresses about like a photo.
    image = Image.blend(Image.linear_gradient("L").resize((side, side)), Image.effect_noise((side, side), 40), 0.3).convert("RGB")
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

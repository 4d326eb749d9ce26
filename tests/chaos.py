"""Faults that the chaos tests inject into servers and bundles, and the images that the fake model must return nevertheless."""

import hashlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path

from img2img_server.bundle.manifest import MANIFEST_NAME
from PIL import Image
from soak_parts.images import noise, png
from soak_parts.stand_in import expected

_ASSET = re.compile(r"[0-9a-f]{64}")


def source(number: int, side: int = 64) -> bytes:
    """The file of an image, different for each number."""
    return png(noise((side, side), number))


def big_source(size: int) -> bytes:
    """The file of an image with `size` bytes and more: what follows a PNG's end is not looked at."""
    return source(1) + os.urandom(size)


def is_right(data: bytes, file: bytes, prompt: str, seed: int, steps: int) -> bool:
    """Whether `data` is the file of the image that a stand-in makes of `file`."""
    with Image.open(io.BytesIO(data)) as made, Image.open(io.BytesIO(file)) as before:
        return made.tobytes() == expected(before, prompt, seed, steps).tobytes()


def torn_assets(folder: Path) -> list[Path]:
    """Files that have an asset's name and not its content."""
    files = [path for path in folder.rglob("*") if path.is_file() and _ASSET.fullmatch(path.name)]
    return [path for path in files if hashlib.sha256(path.read_bytes()).hexdigest() != path.name]


def flip(path: Path) -> None:
    """Changes a byte in the middle of a file, in place."""
    with path.open("r+b") as file:
        middle = path.stat().st_size // 2
        file.seek(middle)
        (byte,) = file.read(1)
        file.seek(middle)
        file.write(bytes([byte ^ 0xFF]))


def truncate(path: Path) -> None:
    """Cuts a file in half, in place."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a byte of a graph flipped": lambda bundle: flip(bundle / "unet" / "model.onnx"),
    "a graph cut in half": lambda bundle: truncate(bundle / "unet" / "model.onnx"),
    "a graph missing": lambda bundle: (bundle / "unet" / "model.onnx").unlink(),
    "a graph that is a folder": lambda bundle: _folder(bundle / "unet" / "model.onnx"),
    "the manifest cut in half": lambda bundle: truncate(bundle / MANIFEST_NAME),
    "the manifest empty": lambda bundle: (bundle / MANIFEST_NAME).write_bytes(b""),
    "the manifest garbage": lambda bundle: (bundle / MANIFEST_NAME).write_bytes(b"\xff\x00" * 50),
    "the manifest a list": lambda bundle: (bundle / MANIFEST_NAME).write_text("[]"),
    "the manifest deep": lambda bundle: (bundle / MANIFEST_NAME).write_text("[" * 100_000),
}
"""Damages of a bundle: it stays in the store and is refused."""


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()

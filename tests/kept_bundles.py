"""Keeps tiny models and their bundles from one run of the tests to the next: `.test-cache/DIGEST`.

The digest is of everything that they are made by: versions of libraries, the exporter's and the server's sources, the models'
builders. Only `.venv` writes there. Another environment with the same versions (`scripts/test --cuda`) reads.
"""

import functools
import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

REPOSITORY = Path(__file__).resolve().parents[1]
KEPT = REPOSITORY / ".test-cache"
MOST_DIGESTS = 2
"""The number of digests whose files are kept: of this run, and of another at the same time."""
PACKAGES = [
    "torch",
    "diffusers",
    "transformers",
    "tokenizers",
    "onnx",
    "onnxruntime",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "optimum",
]
SOURCES = (
    "export/img2img_export/**/*.py",
    "server/img2img_server/**/*.py",
    "tests/tiny_*.py",
    "tests/conftest.py",
    "tests/short_exports.py",
    "demo/model/**/*.*",
    "demo/controlnet/*.*",
)


@functools.cache
def digest() -> str:
    """The digest of versions, without their local part (+cpu), and of sources."""
    found = hashlib.sha256(repr(sys.version_info[:2]).encode())
    for package in PACKAGES:
        found.update(f"{package} {version(package).partition('+')[0]}\n".encode())
    for path in sorted(path for pattern in SOURCES for path in REPOSITORY.glob(pattern)):
        found.update(f"{path.relative_to(REPOSITORY)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()[:16]


def place(session: Path) -> Path:
    """The directory to build in: that of the digest, or `session` in an environment that only reads."""
    if Path(sys.prefix) != REPOSITORY / ".venv":
        return session
    directory = KEPT / digest()
    directory.mkdir(parents=True, exist_ok=True)
    os.utime(directory)
    for old in sorted(KEPT.iterdir(), key=lambda path: path.stat().st_mtime)[:-MOST_DIGESTS]:
        shutil.rmtree(old, ignore_errors=True)
    return directory


def kept(session: Path, name: str, good: Callable[[Path], bool], build: Callable[[Path], object]) -> Path:
    """The directory `name`, built unless it exists and is `good`. If it is killed, `build` leaves a complete directory
    or none."""
    found = KEPT / digest() / name
    if found.is_dir() and good(found):
        return found
    output = place(session) / name
    output.parent.mkdir(exist_ok=True)
    with FileLock(output.parent / f".{output.name}.lock"):
        if not output.is_dir() or not good(output):
            shutil.rmtree(output, ignore_errors=True)
            build(output)
    return output

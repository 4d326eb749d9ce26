"""The demo model, served if no models are configured: found in a checkout, exported on first use, and cached."""

import importlib.util
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from img2img_server.bundle.manifest import read_manifest
from img2img_server.errors import BundleError
from img2img_server.support.distribution import install_hint, user_cache

_MODEL = Path("demo") / "model"
_NEEDED = ("torch", "diffusers", "onnx", "optimum", "onnxruntime", "skimage", "huggingface_hub")
"""Packages that the export imports. Only looked up here, since importing them takes seconds."""


class DemoUnavailable(Exception):
    """The demo model cannot be served. The message is one line with the cause and the remedy."""


def find_model() -> Path | None:
    """The demo model of the checkout that contains this code or is the current directory; None outside of a checkout.

    Wheels do not contain its weights (21 MB).
    """
    roots = (Path(__file__).resolve().parents[3], Path.cwd())
    return next((root / _MODEL for root in roots if (root / _MODEL / "model_index.json").is_file()), None)


def obtain(note: Callable[[str], object], folder: Path | None = None, export: Callable[[Path, Path], int] | None = None) -> Path:
    """The bundle of the demo model in `folder` (None: the user's cache), exported if it is not there yet.

    `note` is called with a line before slow work. `export` exports a model to a bundle and returns an exit status; None runs
    `img2img export`. Raises DemoUnavailable.
    """
    bundle = (folder or user_cache("demo")) / "demo"
    if _is_good(bundle):
        note(f"--models is not set: serving the demo model in {bundle}, a small model for trying out")
        return bundle
    model = find_model()
    if model is None:
        raise DemoUnavailable(
            "the demo model, the default, is only in a checkout of the repository: run `img2img serve` there, or "
            "export your own model: img2img export MODEL --output models/NAME"
        )
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        hint = install_hint("server", "export")
        raise DemoUnavailable(f"exporting the demo model in {model} needs {', '.join(missing)}: {hint}")
    note(f"--models is not set: exporting the demo model in {model} to {bundle}, once; this takes about a minute")
    try:
        bundle.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoUnavailable(f"the folder {bundle.parent} for the demo model cannot be created: {error.strerror}") from None
    if (status := (export or _export)(model, bundle)) != 0:
        raise DemoUnavailable(f"the export of the demo model to {bundle} failed with status {status}: see the lines above")
    return bundle


def _is_good(bundle: Path) -> bool:
    try:
        return read_manifest(bundle).verification.passed
    except BundleError:
        return False


def _export(model: Path, bundle: Path) -> int:
    """Runs `img2img export` in a child process, which is terminated with this one. Returns its exit status."""
    command = [sys.executable, "-m", "img2img_cli", "export", str(model), "--output", str(bundle), "--force"]
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        return process.wait()
    finally:
        process.terminate()
        process.wait()
        signal.signal(signal.SIGTERM, before)

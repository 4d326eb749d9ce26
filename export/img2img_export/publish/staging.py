"""Staging directories: a bundle is built in one and published atomically.

The staging directory is hidden, beside the output and on the same filesystem, so that the finished bundle is renamed into place.
The running export holds a lock that ends with its process, so the lock's holder knows that any other staging directory of this
output is stale. A small cleanup process outlives the export and removes stale directories at once; if it was killed too, the
next export removes them.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from img2img_server.bundle.manifest import MANIFEST_NAME

from img2img_export.errors import ExportError
from img2img_export.read.texts import read_json

_TRIES, _PAUSE = 100, 0.05
_REPLACED = "replaced"
"""Name of the previous bundle in the staging directory while the new one is renamed into place."""


@dataclass(frozen=True, slots=True)
class Staging:
    """The directories of one export: `source` (links to the checkpoint), `bundle` (in progress) and the output."""

    root: Path
    output: Path

    @property
    def source(self) -> Path:
        """The directory with links to the checkpoint's files."""
        return self.root / "source"

    @property
    def bundle(self) -> Path:
        """The directory in which the bundle is built."""
        return self.root / "bundle"

    def publish(self) -> None:
        """Renames the bundle to the output, replacing an existing bundle."""
        if self.output.exists():
            self.output.rename(self.root / _REPLACED)
        self.bundle.rename(self.output)


@contextlib.contextmanager
def stage(output: Path) -> Iterator[Staging]:
    """Creates the staging directories for `output`, and removes them at the end. Removes stale ones first.

    Raises ExportError if another export to `output` is running.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with _lock(output), _cleanup_process(output):
        _remove_stale(output)
        staging = Staging(output.parent / f"{_prefix(output)}{os.getpid()}", output)
        try:
            staging.source.mkdir(parents=True)
            staging.bundle.mkdir()
            yield staging
        finally:
            shutil.rmtree(staging.root)


def sweep(output: Path) -> None:
    """Removes the staging directories of a killed export to `output`. Does nothing if another export runs: that one did."""
    for _ in range(_TRIES):
        try:
            with _lock(output):
                return _remove_stale(output)
        except ExportError:
            # The kernel may close the dead process's pipe shortly before it releases its lock.
            time.sleep(_PAUSE)


@contextlib.contextmanager
def _cleanup_process(output: Path) -> Iterator[None]:
    """Starts a process that waits for this one to end, for any reason, and then sweeps."""
    code = "import sys, pathlib; from img2img_export.publish.staging import sweep\n"
    code += "sys.stdin.read(); sweep(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(output)]
    # In its own session, so that Ctrl-C in a terminal ends the export only.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield
    finally:
        # The export has removed its own staging directory.
        process.kill()
        process.communicate()


def _remove_stale(output: Path) -> None:
    for stale in output.parent.glob(f"{_escape(_prefix(output))}[0-9]*"):
        if not output.exists() and (stale / _REPLACED).exists():
            # The export was killed between the two renames of publish().
            (stale / _REPLACED).rename(output)
        shutil.rmtree(stale)


def _prefix(output: Path) -> str:
    return f".{output.name}.img2img-export."


def check_replaceable(output: Path, force: bool) -> None:
    """Raises ExportError if `output` must not be replaced: only bundles are, and only with `force`."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not _is_bundle(output):
        raise ExportError(f"{output} exists and is not a bundle, so it is never replaced: choose another output")
    if not force:
        raise ExportError(f"{output} holds a bundle that is different, out of date or damaged: use --force to replace it")


def _is_bundle(directory: Path) -> bool:
    """Whether there is a manifest of any format version: an old or damaged bundle is a bundle."""
    try:
        manifest = read_json(directory / MANIFEST_NAME)
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"format_version", "pipeline_class"} <= set(manifest)


@contextlib.contextmanager
def _lock(output: Path) -> Iterator[None]:
    path = output.parent / f"{_prefix(output)}lock"
    try:
        held = FileLock(path, fallback_to_soft=False).acquire(blocking=False)
    except Timeout:
        raise ExportError(f"another export to {output} is running") from None
    with held:
        try:
            yield
        finally:
            path.unlink()


def _escape(text: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)

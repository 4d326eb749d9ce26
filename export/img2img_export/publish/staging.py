"""Where a bundle is built, and how it comes into place: all of it at once, or not at all.

The work is done in a hidden directory beside the output, on the same filesystem, and the finished bundle is renamed into
place. A lock beside it is held by the running export and vanishes with its process, so whoever holds it knows that any
other hidden directory of this output is the litter of a killed export. A small process that outlives the export clears that
at once; where it was killed too, the next export does.
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
"""Where the bundle that was at the output waits for the new one to be in its place."""


@dataclass(frozen=True, slots=True)
class Staging:
    """The directories of one export: links to the source, the bundle in the making, and what it will become."""

    root: Path
    output: Path

    @property
    def source(self) -> Path:
        """Holds links to the files of the checkpoint."""
        return self.root / "source"

    @property
    def bundle(self) -> Path:
        """The bundle in the making."""
        return self.root / "bundle"

    def publish(self) -> None:
        """Makes the bundle appear at the output, in place of one that is there."""
        if self.output.exists():
            self.output.rename(self.root / _REPLACED)
        self.bundle.rename(self.output)


@contextlib.contextmanager
def stage(output: Path) -> Iterator[Staging]:
    """Opens the staging directories for `output`, and removes them at the end however it came. Clears litter first.

    Raises ExportError where another export to `output` is running.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with _lock(output), _janitor(output):
        _clear(output)
        staging = Staging(output.parent / f"{_prefix(output)}{os.getpid()}", output)
        try:
            staging.source.mkdir(parents=True)
            staging.bundle.mkdir()
            yield staging
        finally:
            shutil.rmtree(staging.root)


def sweep(output: Path) -> None:
    """Clears what a killed export to `output` left. Does nothing where another one is running: that has cleared it."""
    for _ in range(_TRIES):
        try:
            with _lock(output):
                return _clear(output)
        except ExportError:
            # The kernel may close the dead process' pipe a moment before it lets go of its lock.
            time.sleep(_PAUSE)


@contextlib.contextmanager
def _janitor(output: Path) -> Iterator[None]:
    """Runs a process that waits for this one to end, however it ends, and sweeps."""
    code = "import sys, pathlib; from img2img_export.publish.staging import sweep\n"
    code += "sys.stdin.read(); sweep(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(output)]
    # In a session of its own, so that Ctrl-C in a terminal ends the export only.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield
    finally:
        # The export has cleared up after itself.
        process.kill()
        process.communicate()


def _clear(output: Path) -> None:
    for litter in output.parent.glob(f"{_escape(_prefix(output))}[0-9]*"):
        if not output.exists() and (litter / _REPLACED).exists():
            # Killed between the two steps of publishing.
            (litter / _REPLACED).rename(output)
        shutil.rmtree(litter)


def _prefix(output: Path) -> str:
    return f".{output.name}.img2img-export."


def check_replaceable(output: Path, force: bool) -> None:
    """Raises ExportError where `output` holds something that must not be replaced. Only bundles ever are, and with `force`."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not _is_bundle(output):
        raise ExportError(f"{output} exists and is no bundle: it is never replaced, choose another output")
    if not force:
        raise ExportError(f"{output} holds another bundle, or one that is out of date or damaged: --force replaces it")


def _is_bundle(directory: Path) -> bool:
    """Whether it has a manifest of any format version: an old or a damaged bundle is a bundle."""
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

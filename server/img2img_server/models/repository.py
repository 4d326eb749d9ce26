"""The folder of bundles: lists, finds and loads them."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from img2img_server.bundle.manifest import MANIFEST_NAME, Manifest, check_bundle, read_manifest
from img2img_server.engine.request import Pipeline
from img2img_server.errors import BundleError

_log = logging.getLogger(__name__)

Load = Callable[[Path, Manifest], Pipeline]

_WANTED = "give a folder of bundles, or one bundle, as `img2img export` makes them"


class BundleRepository:
    """The bundles in the directory `root`, or `root` itself if it is a bundle. `load` makes a pipeline of a bundle's folder.

    `allow_unverified` also opens bundles whose verification failed at export, with a warning. Nothing is cached. Raises
    BundleError if `root` is not a readable directory.
    """

    def __init__(self, root: Path, load: Load, allow_unverified: bool = False) -> None:
        _check_root(root)
        self.root = root
        self.is_bundle = (root / MANIFEST_NAME).is_file()
        self._load = load
        self._allow_unverified = allow_unverified

    def bundles(self) -> list[Path]:
        """All bundles. Links are followed, because the operator controls the folder."""
        return [self.root] if self.is_bundle else sorted(filter(_is_bundle, self.root.iterdir()))

    def others(self) -> list[tuple[Path, str]]:
        """The entries of the folder that are not bundles, each with the reason. Hidden ones, such as an export's staging
        directory, are left out."""
        if self.is_bundle:
            return []
        entries = sorted(entry for entry in self.root.iterdir() if not entry.name.startswith("."))
        return [(entry, _why_no_bundle(entry)) for entry in entries if not _is_bundle(entry)]

    def find(self, name: str) -> Path | None:
        """The bundle whose folder has exactly this name, None if there is none.

        `name` is a caller's input: it is only compared with existing names, never used as a path, and links that lead out of the
        folder are not followed.
        """
        if self.is_bundle:
            return None
        root = self.root.resolve()
        found = next((entry for entry in self.root.iterdir() if entry.name == name), None)
        if found is None or not _is_bundle(found) or found.resolve().parent != root:
            return None
        return found

    def open(self, bundle: Path) -> tuple[Manifest, Pipeline]:
        """Checks a bundle's files and loads it, which is slow. Raises BundleError and the libraries' errors."""
        name = bundle_id(bundle)
        manifest = read_manifest(bundle)
        _log.info("model '%s': checking %d files", name, len(manifest.files))
        check_bundle(bundle, manifest, allow_unverified=self._allow_unverified)
        if not manifest.verification.passed:
            problems = "; ".join(manifest.verification.problems) or "the manifest has no reason"
            _log.warning("model '%s' did not pass verification and is served because of allow_unverified: %s", name, problems)
        _log.info("model '%s': loading", name)
        return manifest, self._load(bundle, manifest)


def bundle_id(bundle: Path) -> str:
    """The id of a bundle's model: the last part of its path, also if it is a link."""
    return Path(os.path.abspath(bundle)).name  # noqa: PTH100 - resolve() would follow the link


def _check_root(root: Path) -> None:
    """Raises BundleError with the reason if `root` is neither a readable folder nor a bundle."""
    try:
        next(root.iterdir(), None)
        (root / MANIFEST_NAME).stat()
    except NotADirectoryError:
        raise BundleError(f"models: {root} is a file, not a folder: {_WANTED}") from None
    except FileNotFoundError:
        if not root.exists():
            raise BundleError(f"models: {root} does not exist: {_WANTED}") from None
    except OSError as error:
        raise BundleError(f"models: {root} cannot be read: {error.strerror}") from None
    if (root / "model_index.json").is_file() and not (root / MANIFEST_NAME).is_file():
        raise BundleError(
            f"models: {root} is a model that was not exported: run `img2img export {root} --output DIR` and serve DIR"
        )


def _is_bundle(folder: Path) -> bool:
    return not folder.name.startswith(".") and _is_file(folder / MANIFEST_NAME)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a folder without permission to read it
        return False


def _why_no_bundle(entry: Path) -> str:
    """Why an entry of the model folder is not a bundle, and how to fix it."""
    if entry.is_symlink() and not entry.exists():
        return f"a link to {entry.readlink()}, which does not exist"
    if not entry.is_dir():
        weights = entry.suffix.lower() in (".safetensors", ".ckpt", ".gguf")
        return "a checkpoint, not a bundle: export it with `img2img export`" if weights else "a file, not a directory"
    try:
        names = {child.name for child in entry.iterdir()}
    except OSError as error:
        return f"a directory that cannot be read: {error.strerror}"
    if "model_index.json" in names:
        return f"a model without {MANIFEST_NAME}, not a bundle: export it with `img2img export`"
    inner = sorted(name for name in names if _is_bundle(entry / name))
    if inner:
        return f"a directory of bundles ({', '.join(inner)}), not a bundle: move or link them into the model folder"
    return f"a directory without {MANIFEST_NAME}, not a bundle"

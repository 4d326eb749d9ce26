"""The folder of bundles: which there are, which of them a name means, and how one becomes a pipeline."""

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
    """The bundles in the directory `root`, or `root` itself where it is one. `load` makes a pipeline of a bundle's folder.

    `allow_unverified` also opens those whose verification failed when they were exported, with a warning. Nothing is
    remembered: what is there is looked up each time. Raises BundleError if `root` is no directory that can be read.
    """

    def __init__(self, root: Path, load: Load, allow_unverified: bool = False) -> None:
        _check_root(root)
        self.root = root
        self.is_bundle = (root / MANIFEST_NAME).is_file()
        self._load = load
        self._allow_unverified = allow_unverified

    def bundles(self) -> list[Path]:
        """Every bundle. Links are followed: whoever starts the server knows what lies in its folder."""
        return [self.root] if self.is_bundle else sorted(filter(_is_bundle, self.root.iterdir()))

    def others(self) -> list[tuple[Path, str]]:
        """The entries of the folder that are not bundles, each with the reason. Hidden ones, such as an export's staging
        directory, are left out."""
        if self.is_bundle:
            return []
        entries = sorted(entry for entry in self.root.iterdir() if not entry.name.startswith("."))
        return [(entry, _why_no_bundle(entry)) for entry in entries if not _is_bundle(entry)]

    def find(self, name: str) -> Path | None:
        """The bundle whose folder has this very name, None where there is none.

        `name` is anything that a caller sent. It is compared with the names that are there and never made a path of, and a link
        that leads out of the folder is not followed.
        """
        if self.is_bundle:
            return None
        root = self.root.resolve()
        found = next((entry for entry in self.root.iterdir() if entry.name == name), None)
        if found is None or not _is_bundle(found) or found.resolve().parent != root:
            return None
        return found

    def open(self, bundle: Path) -> tuple[Manifest, Pipeline]:
        """Checks a bundle's files and loads it, which takes long. Raises BundleError, and whatever the libraries raise."""
        name = bundle_id(bundle)
        manifest = read_manifest(bundle)
        _log.info("model '%s': checking %d files", name, len(manifest.files))
        check_bundle(bundle, manifest, allow_unverified=self._allow_unverified)
        if not manifest.verification.passed:
            problems = "; ".join(manifest.verification.problems) or "nothing is known of why"
            _log.warning("model '%s' did not pass verification, and is served all the same: %s", name, problems)
        _log.info("model '%s': loading", name)
        return manifest, self._load(bundle, manifest)


def bundle_id(bundle: Path) -> str:
    """The id of the model that a bundle's path stands for: the path's own last name, also if it is a link."""
    return Path(os.path.abspath(bundle)).name  # noqa: PTH100 - resolve() would follow the link


def _check_root(root: Path) -> None:
    """Raises BundleError, which says what is wrong with it, if `root` cannot be a folder of bundles or a bundle."""
    try:
        next(root.iterdir(), None)
        (root / MANIFEST_NAME).stat()
    except NotADirectoryError:
        raise BundleError(f"models: {root} is a file, not a folder: {_WANTED}") from None
    except FileNotFoundError:
        if not root.exists():
            raise BundleError(f"models: there is no folder {root}: {_WANTED}") from None
    except OSError as error:
        raise BundleError(f"models: {root} cannot be read: {error.strerror}") from None
    if (root / "model_index.json").is_file() and not (root / MANIFEST_NAME).is_file():
        raise BundleError(
            f"models: {root} is a model that was not exported: run `img2img export {root} --output DIR`, and serve DIR"
        )


def _is_bundle(folder: Path) -> bool:
    return not folder.name.startswith(".") and _is_file(folder / MANIFEST_NAME)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a folder that may not be read
        return False


def _why_no_bundle(entry: Path) -> str:
    """What an entry of the model folder is instead of a bundle, and what to do about it."""
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

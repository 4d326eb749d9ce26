"""The folders of LoRAs and of image adapters that requests may name: `DIR/NAME.safetensors` has the id NAME, and
`DIR/FOLDER/NAME.safetensors` the id FOLDER/NAME. Standard library only."""

import contextlib
import functools
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

from img2img_server.bundle.files import walk

SUFFIX = ".safetensors"
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_MOST_FILES = 10_000
_SHOWN = 10
"""Maximum number of ids in an error message."""


class AdapterProblem(ValueError):
    """An adapter cannot be used. The message is a clause that begins with a verb, such as "is damaged"."""


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A file of the folder. `digest` is its SHA-256 in hexadecimal."""

    id: str
    path: Path
    bytes: int
    digest: str


class AdapterFiles:
    """The adapters in `folder`, None for no folder. Files may be added, replaced and removed at any time. Thread-safe; blocks.

    A subclass sets words for messages: `what` the adapters are called, the server's `flag` for the folder, and its `cache_flag`
    for the memory of loaded adapters.
    """

    what: ClassVar[str]
    flag: ClassVar[str]
    cache_flag: ClassVar[str]

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def ids(self) -> list[str]:
        """The ids of all files, sorted."""
        if self.folder is None:
            return []
        found = []
        for parent, _, names in walk(self.folder):
            below = PurePosixPath(Path(parent).relative_to(self.folder).as_posix())
            found += [str(below / name.removesuffix(SUFFIX)) for name in names if name.endswith(SUFFIX)]
            if len(found) > _MOST_FILES:
                break
        return sorted(found)[:_MOST_FILES]

    def sizes(self) -> list[tuple[str, int]]:
        """The ids of all files with their sizes in bytes, sorted."""
        found = []
        for name in self.ids():
            assert self.folder is not None, "a folder was searched"
            with contextlib.suppress(OSError):  # removed meanwhile
                found.append((name, (self.folder / f"{name}{SUFFIX}").stat().st_size))
        return found

    def find(self, name: str) -> AdapterFile:
        """The adapter with the id `name`. Raises AdapterProblem."""
        path, found = self.locate(name)
        return AdapterFile(name, path, found.st_size, _digest_of(path, found))

    def locate(self, name: str) -> tuple[Path, os.stat_result]:
        """The file of the id `name`, and its status. Raises AdapterProblem."""
        if self.folder is None:
            raise AdapterProblem(f"is not available: this server has no folder of {self.what}s (img2img serve {self.flag} DIR)")
        parts = name.split("/")
        if not all(part not in ("", ".", "..") and "\\" not in part and part.isprintable() for part in parts):
            raise AdapterProblem(
                f"is not a valid id: an id is the path of a file below the folder of {self.what}s, without {SUFFIX}"
            )
        path = self.folder.joinpath(*parts[:-1], parts[-1] + SUFFIX)
        try:
            found = path.stat()
        except OSError:
            raise AdapterProblem(self._missing(parts)) from None
        if not stat.S_ISREG(found.st_mode):
            raise AdapterProblem("is not a regular file")
        return path, found

    def _missing(self, parts: list[str]) -> str:
        assert self.folder is not None, "a folder was searched"
        for suffix in _PICKLES:
            if _exists(self.folder.joinpath(*parts[:-1], parts[-1] + suffix)):
                return f"is a pickle ({suffix}), which can run code when read: convert it to safetensors"
        known = self.ids()
        more = "" if len(known) <= _SHOWN else f" and {len(known) - _SHOWN} more"
        return f"is not in this server's folder of {self.what}s, which has {', '.join(known[:_SHOWN]) or 'none'}{more}"


class LoraFiles(AdapterFiles):
    """The folder of LoRAs."""

    what, flag, cache_flag = "LoRA", "--loras", "--lora-cache"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # its name is too long, or a folder may not be read
        return False


def _digest_of(path: Path, found: os.stat_result) -> str:
    """The file's SHA-256. Raises AdapterProblem."""
    try:
        return _read_digest(path, found.st_ino, found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise AdapterProblem(f"cannot be read: {error.strerror}") from None


@functools.lru_cache(_MOST_FILES)
def _read_digest(path: Path, inode: int, size: int, modified: int) -> str:
    """Reads a file once for all requests and models, until it is changed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""The folder of LoRAs that requests may name: `DIR/NAME.safetensors` has the id NAME, and `DIR/FOLDER/NAME.safetensors` the id
FOLDER/NAME. Standard library only."""

import contextlib
import hashlib
import os
import stat
import threading
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from img2img_server.bundle.files import walk

SUFFIX = ".safetensors"
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_MOST_FILES = 10_000
_SHOWN = 10
"""Maximum number of ids in an error message."""


class LoraProblem(ValueError):
    """A LoRA cannot be used. The message is a clause that begins with a verb, such as "is damaged"."""


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A file of the folder. `digest` is its SHA-256 in hexadecimal."""

    id: str
    path: Path
    bytes: int
    digest: str


class LoraFiles:
    """The LoRAs in `folder`, None for no folder. Files may be added, replaced and removed at any time. Thread-safe; blocks."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._digests: dict[tuple[object, ...], str] = {}
        self._lock = threading.Lock()

    def ids(self) -> list[str]:
        """The ids of all LoRAs, sorted."""
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
        """The ids of all LoRAs with the files' sizes in bytes, sorted."""
        found = []
        for name in self.ids():
            assert self.folder is not None, "a folder was searched"
            with contextlib.suppress(OSError):  # removed meanwhile
                found.append((name, (self.folder / f"{name}{SUFFIX}").stat().st_size))
        return found

    def find(self, name: str) -> LoraFile:
        """The LoRA with the id `name`. Raises LoraProblem."""
        if self.folder is None:
            raise LoraProblem("is not available: this server has no folder of LoRAs (img2img serve --loras DIR)")
        parts = name.split("/")
        if not all(part not in ("", ".", "..") and "\\" not in part and part.isprintable() for part in parts):
            raise LoraProblem(
                "is not the id of a LoRA: an id is the path of a file below the folder of LoRAs, without .safetensors"
            )
        path = self.folder.joinpath(*parts[:-1], parts[-1] + SUFFIX)
        try:
            found = path.stat()
        except OSError:
            raise LoraProblem(self._missing(parts)) from None
        if not stat.S_ISREG(found.st_mode):
            raise LoraProblem("is not a regular file")
        return LoraFile(name, path, found.st_size, self._digest(path, found))

    def _missing(self, parts: list[str]) -> str:
        assert self.folder is not None, "a folder was searched"
        for suffix in _PICKLES:
            if self.folder.joinpath(*parts[:-1], parts[-1] + suffix).exists():
                return f"is a pickle ({suffix}), which can run code when read: convert it to safetensors"
        known = self.ids()
        more = "" if len(known) <= _SHOWN else f" and {len(known) - _SHOWN} more"
        return f"is not in this server's folder of LoRAs, which has {', '.join(known[:_SHOWN]) or 'none'}{more}"

    def _digest(self, path: Path, found: os.stat_result) -> str:
        key = (path, found.st_ino, found.st_size, found.st_mtime_ns)
        with self._lock:
            known = self._digests.get(key)
        if known is None:
            try:
                with path.open("rb") as file:
                    known = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise LoraProblem(f"cannot be read: {error.strerror}") from None
            with self._lock:
                if len(self._digests) >= _MOST_FILES:
                    self._digests.clear()
                self._digests[key] = known
        return known

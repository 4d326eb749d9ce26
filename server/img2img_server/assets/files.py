"""The asset store's files, in any filesystem that fsspec supports. Writes are atomic, even in a crash.

Everything here blocks. Files are at <owner>/<first two digits of id>/<id>. A local folder also contains ".parts", where files are
written before they are renamed.
"""

import hashlib
import os
import re
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from img2img_server.support.call import Call
from img2img_server.support.distribution import user_cache

_FILE = re.compile(r"(?P<owner>shared|client-[0-9a-f]{32})/(?P<start>[0-9a-f]{2})/(?P<id>(?P=start)[0-9a-f]{62})")
_ID = re.compile(r"[0-9a-f]{64}")
_BLOCK = 2**20
_PARTS = ".parts"
_LEFT_OVER = 3600.0
"""Age in seconds at which an unfinished file counts as left by a crash. Another server may still be writing a younger one."""
_MODIFIED = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""The filesystems' names for a file's modification time."""


@dataclass(frozen=True, slots=True)
class Found:
    """An existing file. `used` is the filesystem's time of its last use, in seconds since 1970."""

    owner: str
    id: str
    size: int
    used: float


class AssetFiles:
    """Files of an fsspec filesystem below `root`. Writes are as atomic as the filesystem's `pipe_file`; in object stores it is
    atomic. Methods raise the filesystem's exceptions, and FileNotFoundError for a missing file."""

    def __init__(self, system: Any, root: str) -> None:
        self._system = system
        self._root = root.rstrip("/")
        self._folders: set[str] = set()

    def prepare(self, now: float) -> None:
        """Checks that files can be written and deleted. `now` is in seconds since 1970."""
        probe = f"{self._root}/.probe-{uuid.uuid4().hex}"
        self._system.pipe_file(probe, b"img2img")
        self._system.rm_file(probe)

    def found(self) -> list[Found]:
        """All asset files. Other files are ignored."""
        listed = self._system.find(self._root, detail=True)
        return [found for name, info in listed.items() if (found := self._described(name, info)) is not None]

    def look(self, owner: str, asset_id: str) -> Found:
        """The current size and time of one file."""
        place = self._place(owner, asset_id)
        found = self._described(place, self._system.info(place))
        if found is None:
            raise FileNotFoundError(place)
        return found

    def read(self, owner: str, asset_id: str, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, fewer if the file is shorter."""
        return bytes(self._system.cat_file(self._place(owner, asset_id), start=start, end=end))

    def intact(self, owner: str, asset_id: str) -> bool:
        """Whether a file exists and its SHA-256 is its id."""
        hashed, start = hashlib.sha256(), 0
        try:
            while block := self.read(owner, asset_id, start, start + _BLOCK):
                hashed.update(block)
                start += len(block)
        except FileNotFoundError:
            return False
        return hashed.hexdigest() == asset_id

    def write(self, owner: str, asset_id: str, data: bytes) -> None:
        """Writes a file."""
        place = self._place(owner, asset_id)
        folder = place.rpartition("/")[0]
        if folder not in self._folders:
            self._system.makedirs(folder, exist_ok=True)
            self._folders.add(folder)
        self._system.pipe_file(place, data)

    def remove(self, owner: str, asset_id: str) -> None:
        """Deletes a file."""
        self._system.rm_file(self._place(owner, asset_id))

    def touch(self, owner: str, asset_id: str, now: float) -> None:
        """Records a use at `now`, in seconds since 1970, if the filesystem supports that. This one does not."""

    def _place(self, owner: str, asset_id: str) -> str:
        return f"{self._root}/{owner}/{asset_id[:2]}/{asset_id}"

    def _described(self, name: str, info: Mapping[str, Any]) -> Found | None:
        matched = _FILE.fullmatch(name.removeprefix(self._root).lstrip("/"))
        if matched is None or info["type"] != "file":
            return None
        return Found(matched["owner"], matched["id"], int(info["size"] or 0), _modified(info))


class LocalAssetFiles(AssetFiles):
    """Files in a local folder. Written files survive a crash of the machine and are readable by their owner only."""

    def prepare(self, now: float) -> None:
        """Creates the folder, checks that it is writable, and deletes unfinished files older than an hour."""
        parts = Path(self._root, _PARTS)
        made = [folder for folder in (parts, *parts.parents) if not folder.exists()]
        parts.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in made:
            _sync_folder(folder.parent)
        Path(self._root).chmod(0o700)
        for part in parts.iterdir():
            with suppress(FileNotFoundError):  # deleted by another server that starts now
                if part.stat().st_mtime < now - _LEFT_OVER:
                    part.unlink()
        self._write_part(b"img2img").unlink()

    def write(self, owner: str, asset_id: str, data: bytes) -> None:
        """Writes a file, flushes it to disk, and renames it to its final path."""
        place = Path(self._place(owner, asset_id))
        part = self._write_part(data)
        try:
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            part.replace(place)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        # The folder's own entry, and that of the owner's folder, may be new too.
        for folder in (place.parent, place.parent.parent, Path(self._root)):
            _sync_folder(folder)

    def touch(self, owner: str, asset_id: str, now: float) -> None:
        """Records a use as the file's modification time."""
        os.utime(self._place(owner, asset_id), (now, now))

    def _write_part(self, data: bytes) -> Path:
        part = Path(self._root, _PARTS, uuid.uuid4().hex)
        try:
            with open(part, "xb", opener=_private) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            part.unlink(missing_ok=True)
            raise
        return part


def owner_of(call: Call) -> str:
    """The owner of the assets that a call sees: its token, or "shared" without tokens, since addresses are no identity."""
    if not call.authenticated:
        return "shared"
    return f"client-{hashlib.sha256(call.client.encode()).hexdigest()[:32]}"


def is_id(text: str) -> bool:
    """Whether a text has the form of an asset's id."""
    return _ID.fullmatch(text) is not None


def open_files(url: str | None) -> AssetFiles:
    """The files below a folder or an fsspec URL, None for the default folder. Raises OSError if it cannot be opened."""
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

    try:
        # fsspec's cached listings would hide other servers' files.
        system, root = url_to_fs(url or str(default_folder()), use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise OSError(f"assets: '{url}' needs a package that is not installed: {error}") from None
    except ValueError as error:
        raise OSError(f"assets: '{url}' cannot be opened: {error}") from None
    return LocalAssetFiles(system, root) if isinstance(system, LocalFileSystem) else AssetFiles(system, root)


def default_folder() -> Path:
    """The default folder of assets: img2img/assets in the user's cache directory."""
    return user_cache("assets")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _sync_folder(folder: Path) -> None:
    """Flushes the folder's entries to disk. Otherwise a power cut may lose a file although its bytes were written."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _modified(info: Mapping[str, Any]) -> float:
    for key in _MODIFIED:
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return time.time()

"""The cache of built engines on disk. An engine takes minutes to build, so it is built once per machine.

An entry is a folder named by the digest of its key. The key contains everything that an engine depends on, so engines for another
GPU, version or model are not found. A record with the SHA-256 of every file is written last: an entry without it, or with other
contents, is deleted and built again.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from img2img_server.bundle.manifest import digest_files, sha256_of
from img2img_server.support.cancellation import Stop
from img2img_server.support.distribution import user_cache

_log = logging.getLogger(__name__)

_KEY, _RECORD = "key.json", "record.json"
_UNFINISHED, _LOCKS = ".building", "locks"
COSTS = "costs"
"""The folder of CostStore's files."""
_ENTRY = re.compile(rf"[0-9a-f]{{64}}({re.escape(_UNFINISHED)})?")
"""The names of entries. Other parts of the runtime have folders of their own beside them, as measured_choice.py does."""
_LOCK_INTERVAL = 0.5
"""Seconds between attempts to take a lock that another process holds."""

Key = Mapping[str, Any]
"""Everything that an engine depends on, as JSON values."""


class EngineCache:
    """The entries in the folder `root`: at most `most_entries` with `most_bytes` in total, evicted in LRU order."""

    def __init__(self, root: Path, most_entries: int = 24, most_bytes: int = 64 * 2**30) -> None:
        self._root = root
        self._most_entries, self._most_bytes = most_entries, most_bytes

    def obtain(self, key: Key, build: Callable[[Path], object], stop: Stop) -> Path:
        """Returns the folder of the entry of `key`. If there is no valid entry, calls `build` with an empty folder to fill.

        If another process builds the same entry, waits for it. Raises the errors of `build`, Stopped, and OSError.
        """
        # Its contents are executed, so other users must not write here.
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        entry = self._root / digest_of(key)
        with self._locked(entry.name, stop):
            if not self._is_good(entry, key):
                self._make(entry, key, build)
            os.utime(entry / _RECORD)
        self._prune(entry)
        return entry

    def find(self, key: Key, stop: Stop) -> Path | None:
        """The folder of the entry of `key`, None if there is no valid one. Raises OSError, Stopped."""
        entry = self._root / digest_of(key)
        with self._locked(entry.name, stop):
            return entry if self._is_good(entry, key) else None

    def replace(self, key: Key, files: Mapping[str, Path], stop: Stop) -> None:
        """Replaces the entry of `key` by copies of `files`, which are keyed by their new names. Raises OSError, Stopped."""
        entry = self._root / digest_of(key)

        def copy(folder: Path) -> None:
            for name, path in files.items():
                shutil.copyfile(path, folder / name)

        with self._locked(entry.name, stop):
            _remove(entry)
            self._make(entry, key, copy)

    def _make(self, entry: Path, key: Key, build: Callable[[Path], object]) -> None:
        folder = entry.with_name(entry.name + _UNFINISHED)
        _remove(folder)
        folder.mkdir()
        try:
            build(folder)
            (folder / _KEY).write_text(json.dumps(key, indent=1, sort_keys=True), encoding="utf-8")
            record = json.dumps({"files": digest_files(folder, _files(folder))}, indent=1)
            (folder / f"{_RECORD}.part").write_text(record, encoding="utf-8")
            (folder / f"{_RECORD}.part").replace(folder / _RECORD)
            folder.replace(entry)
        finally:
            _remove(folder)

    def _is_good(self, entry: Path, key: Key) -> bool:
        """Whether the entry exists and is as it was built for `key`. An invalid entry is logged and deleted."""
        if not entry.exists():
            return False
        problem = _problem(entry, key)
        if problem:
            _log.warning("the cached engine %s is invalid and is built again: %s", entry, problem)
            _remove(entry)
        return not problem

    @contextlib.contextmanager
    def _locked(self, name: str, stop: Stop) -> Iterator[None]:
        """Holds the lock of an entry, which the operating system releases if the process ends."""
        waits = False
        while (held := self._try_lock(name)) is None:
            if not waits:
                _log.info("another process builds the engine %s: waiting for it", name[:12])
            waits = True
            stop.wait(_LOCK_INTERVAL)
        with held:
            yield

    def _try_lock(self, name: str) -> contextlib.AbstractContextManager[object] | None:
        """The lock of an entry, held, or None if another process holds it."""
        (self._root / _LOCKS).mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            return FileLock(self._root / _LOCKS / name, fallback_to_soft=False).acquire(blocking=False)
        except Timeout:
            return None

    def _prune(self, kept: Path) -> None:
        """Deletes the least recently used entries that exceed the bounds, and unfinished entries of dead processes."""
        entries = sorted((path for path in self._root.iterdir() if _ENTRY.fullmatch(path.name)), key=_last_used, reverse=True)
        count, size = 0, 0
        for entry in entries:
            count += 1
            size += sum(file.stat().st_size for file in entry.rglob("*") if file.is_file())
            unfinished = entry.name.endswith(_UNFINISHED)
            if entry == kept or not (unfinished or count > self._most_entries or size > self._most_bytes):
                continue
            held = self._try_lock(entry.name.removesuffix(_UNFINISHED))
            if held is not None:
                with held:
                    _remove(entry)


def default_root() -> Path:
    """The default folder of engines: img2img/engines in the user's cache directory."""
    return user_cache("engines")


def digest_of(key: Key) -> str:
    """The name of a key's entry: the SHA-256 of its JSON, in lower-case hexadecimal."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _problem(entry: Path, key: Key) -> str:
    """Why an entry is invalid, "" if it is valid."""
    try:
        record = json.loads((entry / _RECORD).read_text(encoding="utf-8"))
        wanted = record["files"]
        if list(wanted) != _files(entry):
            return "files are missing or were added"
        for name, digest in wanted.items():
            if sha256_of(entry / name) != digest:
                return f"{name} was changed"
        if json.loads((entry / _KEY).read_text(encoding="utf-8")) != json.loads(json.dumps(key)):
            return "it was built for something else"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it cannot be read: {error}"
    return ""


def _files(folder: Path) -> list[str]:
    """The names of an entry's files, without the record and without links, so that links make an entry invalid."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and path.parent == folder)
    return sorted(path.name for path in found if not path.name.startswith(_RECORD))


def _last_used(entry: Path) -> float:
    record = entry / _RECORD
    return record.stat().st_mtime if record.is_file() else 0.0


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)

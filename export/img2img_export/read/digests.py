"""A persistent cache of files' SHA-256, so that an unchanged source of 10 GB is not read again.

Like in git's index, an entry is valid while the file's inode, size and times are unchanged.
"""

import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from img2img_server.support.distribution import user_cache

from img2img_export.progress import Advance, Progress

_RACY_NS = 2 * 10**9
"""Files modified more recently than this are not cached: they could change again within one tick of the file system's clock."""

_PROGRESS_BYTES = 100 * 10**6
"""Progress is reported if at least this many bytes have to be hashed."""

_LIMIT = 4096
_CHUNK = 1 << 20
_FORMAT = 1

Entry = tuple[int, int, int, int, str]
"""Inode, size, time of modification and of change in nanoseconds, SHA-256 in hexadecimal."""


class Digests:
    """The digests of this process and of earlier ones, kept in the user's cache directory.

    A damaged, unreadable or unwritable cache is not an error: files are hashed instead. New digests are lost unless `save` is
    called. `now` returns the time in nanoseconds.
    """

    def __init__(self, path: Path | None = None, now: Callable[[], int] = time.time_ns) -> None:
        self._path = path or user_cache("digests.json")
        self._now = now
        self._files, self._answers = _read(self._path)
        self._new_files: dict[str, Entry] = {}
        self._new_answers: dict[str, str] = {}

    def sha256(self, path: Path, advance: Advance = lambda count: None) -> str:
        """The SHA-256 of a file in lower-case hexadecimal. `advance` is called with the numbers of bytes read."""
        path = path.resolve()
        if (known := self._find(path)) is not None:
            return known
        start, before = self._now(), _stamp(path)
        digest = _hash(path, advance)
        if before == _stamp(path) and max(before[2:]) <= start - _RACY_NS:
            self._files[str(path)] = self._new_files[str(path)] = (*before, digest)
        return digest

    def digest_files(self, root: Path, names: Iterable[str], progress: Progress | None = None) -> dict[str, str]:
        """Maps each of `names` to the SHA-256 of that file in `root`. Reports to `progress` if there is much to read."""
        paths = {name: root / name for name in names}
        unknown = sum(path.stat().st_size for path in paths.values() if self._find(path.resolve()) is None)
        if progress is None or unknown < _PROGRESS_BYTES:
            return {name: self.sha256(path) for name, path in paths.items()}
        with progress.task(f"hashing {root.name}", unknown) as advance:
            return {name: self.sha256(path, advance) for name, path in paths.items()}

    def remember(self, path: Path, digest: str) -> None:
        """Caches the digest of a file that was hashed before it was moved to `path`."""
        path = path.resolve()
        stamp = _stamp(path)
        if max(stamp[2:]) <= self._now() - _RACY_NS:
            self._files[str(path)] = self._new_files[str(path)] = (*stamp, digest)

    def recall(self, question: str, find_out: Callable[[], str]) -> str:
        """A cached answer to a question whose answer never changes, such as one about contents by digest."""
        if question not in self._answers:
            self._answers[question] = self._new_answers[question] = find_out()
        return self._answers[question]

    def save(self) -> None:
        """Adds this process's results to the cache. If two processes save at once, the results of one may be lost."""
        if not self._new_files and not self._new_answers:
            return
        files, answers = _read(self._path)
        files = {path: entry for path, entry in {**files, **self._new_files}.items() if Path(path).exists()}
        answers = {**answers, **self._new_answers}
        data = {"format": _FORMAT, "files": _newest(files), "answers": _newest(answers)}
        with contextlib.suppress(OSError):
            _write(self._path, json.dumps(data))

    def _find(self, path: Path) -> str | None:
        """The cached digest of a resolved path if still valid, else None."""
        entry = self._files.get(str(path))
        return entry[4] if entry is not None and entry[:4] == _stamp(path) else None


def _stamp(path: Path) -> tuple[int, int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _hash(path: Path, advance: Advance) -> str:
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            advance(count)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The cache's contents: empty if it cannot be read, without malformed entries."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}, {}
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        return {}, {}
    files, answers = data.get("files"), data.get("answers")
    if not isinstance(files, dict) or not isinstance(answers, dict):
        return {}, {}
    return (
        {name: (*entry[:4], entry[4]) for name, entry in files.items() if _is_entry(entry)},
        {question: answer for question, answer in answers.items() if isinstance(answer, str)},
    )


def _is_entry(value: Any) -> bool:
    return isinstance(value, list) and [type(item) for item in value] == [int, int, int, int, str] and len(value[4]) == 64


def _newest(entries: dict[str, Any]) -> dict[str, Any]:
    return dict(list(entries.items())[-_LIMIT:])


def _write(path: Path, text: str) -> None:
    """Writes a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(text)
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink()
        raise

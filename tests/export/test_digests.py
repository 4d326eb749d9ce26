"""The digest cache always returns the digest of the file's current content, and its failure never fails an export."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from img2img_export.progress import Advance, Progress
from img2img_export.read import digests
from img2img_export.read.digests import Digests
from img2img_server.bundle.manifest import digest_files

SECOND = 10**9


def later() -> int:
    """A time at which a file that was just written has settled."""
    return time.time_ns() + 10 * SECOND


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "digests.json"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(b"a" * 3_000_000)
    return tmp_path / "weights"


def ask(cache: Path, file: Path) -> tuple[str, int]:
    """The digest by a process of its own, and how many bytes it read for it."""
    known, read = Digests(cache, later), [0]

    def advance(count: int) -> None:
        read[0] += count

    digest = known.sha256(file, advance)
    known.save()
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    return digest, read[0]


def test_file_is_hashed_once(cache: Path, file: Path) -> None:
    digest, read = ask(cache, file)
    assert read == 3_000_000
    assert ask(cache, file) == (digest, 0)
    (file.parent / "link").symlink_to(file)
    assert ask(cache, file.parent / "link") == (digest, 0)


def test_a_change_is_noticed_even_if_size_and_mtime_are_the_same(cache: Path, file: Path) -> None:
    first, before = ask(cache, file), file.stat()
    file.write_bytes(b"b" * 3_000_000)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ask(cache, file)[0] != first[0]
    other = Path(shutil.copy2(file, file.with_name("other")))
    other.write_bytes(b"c" * 3_000_000)
    other.replace(file)
    assert ask(cache, file)[1] == 3_000_000


def test_recently_changed_file_is_not_cached(cache: Path, file: Path) -> None:
    changed = max(file.stat().st_mtime_ns, file.stat().st_ctime_ns)
    for now, read in ((changed + SECOND, 3_000_000), (changed + 3 * SECOND, 3_000_000), (changed + 3 * SECOND, 0)):
        known, count = Digests(cache, lambda now=now: now), []  # type: ignore[misc, var-annotated]
        known.sha256(file, count.append)
        known.save()
        assert sum(count) == read


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", '{"format": 1}', "[" * 100_000, '{"format": 2, "files": {}, "answers": {}}']
)
def test_damaged_cache_is_ignored(damage: str, cache: Path, file: Path) -> None:
    ask(cache, file)
    cache.write_text(damage)
    assert ask(cache, file)[1] == 3_000_000
    assert ask(cache, file)[1] == 0


def test_damaged_entries_are_ignored(cache: Path, file: Path) -> None:
    ask(cache, file)
    data = json.loads(cache.read_text())
    for entry in (None, [], [1, 2, 3, 4], [*data["files"][str(file)][:4], "short"], ["1", 2, 3, 4, "a" * 64]):
        cache.write_text(json.dumps({**data, "files": {str(file): entry}}))
        assert ask(cache, file)[1] == 3_000_000


def test_unwritable_cache_is_not_an_error(file: Path) -> None:
    assert ask(file / "digests.json", file)[1] == 3_000_000
    assert ask(Path("/proc/digests.json"), file)[1] == 3_000_000


def test_digest_cache_is_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for root, place in (
        ("", tmp_path / "home" / ".cache"),
        ("relative", tmp_path / "home" / ".cache"),
        (str(tmp_path), tmp_path),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", root)
        known = Digests(now=later)
        known.sha256(file)
        known.save()
        (place / "img2img" / "digests.json").unlink()


def test_vanished_files_leave_the_digest_cache(cache: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_LIMIT", 3)
    for index in range(5):
        (tmp_path / f"{index}").write_text("hello")
        ask(cache, tmp_path / f"{index}")
    assert [Path(path).name for path in json.loads(cache.read_text())["files"]] == ["2", "3", "4"]
    (tmp_path / "3").unlink()
    ask(cache, file)
    assert [Path(path).name for path in json.loads(cache.read_text())["files"]] == ["2", "4", "weights"]


def test_concurrent_saves_keep_each_others_digests(cache: Path, file: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("other")
    one, two = Digests(cache, later), Digests(cache, later)
    one.sha256(file)
    two.sha256(tmp_path / "other")
    one.save()
    two.save()
    assert ask(cache, file)[1] == ask(cache, tmp_path / "other")[1] == 0


def test_digest_cache_is_written_atomically(cache: Path, tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from img2img_export.read.digests import Digests
for round in range(20):
    known = Digests(Path(sys.argv[1]), lambda: time.time_ns() + 10**10)
    known.recall(f"{sys.argv[2]} {round}", lambda: "answer" * 1000)
    known.save()
"""
    started = [subprocess.Popen([sys.executable, "-c", code, str(cache), name]) for name in "abc"]
    while any(process.poll() is None for process in started):
        if cache.exists():
            json.loads(cache.read_text())
    assert [process.returncode for process in started] == [0, 0, 0]
    assert list(cache.parent.iterdir()) == [cache]


def test_recalled_value_is_computed_once(cache: Path) -> None:
    known = Digests(cache)
    assert known.recall("the answer", lambda: "42") == "42"
    known.save()
    assert Digests(cache).recall("the answer", lambda: "forgotten") == "42"


def test_digests_of_a_folder_are_computed_with_progress(cache: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []

    class Recorder(Progress):
        @contextmanager
        def task(self, label: str, total: int, unit: str = "B") -> Iterator[Advance]:
            counts: list[int] = []
            yield counts.append
            told.append((label, total, sum(counts)))

    (file.parent / "small").write_text("small")
    names = ["weights", "small"]
    expected = digest_files(file.parent, names)
    assert Digests(cache).digest_files(file.parent, names, Recorder()) == expected
    assert told == []
    monkeypatch.setattr(digests, "_PROGRESS_BYTES", 1_000_000)
    assert Digests(cache).digest_files(file.parent, names, Recorder()) == expected
    assert told == [(f"hashing {file.parent.name}", 3_000_005, 3_000_005)]

"""Built engines on disk are found again only when whole, unchanged and for this very machine; builds die with their parent."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from img2img_server.bundle.manifest import sha256_of
from img2img_server.errors import BundleError
from img2img_server.runtime.tensorrt.build import run_build
from img2img_server.runtime.tensorrt.cache import EngineCache, default_root, digest_of
from img2img_server.support.cancellation import Stop, Stopped

KEY = {"gpu": "a", "options": {"x": "1"}}


class Builder:
    """Fills an entry, and counts how often."""

    def __init__(self, content: bytes = b"engine") -> None:
        self.count = 0
        self._content = content

    def __call__(self, folder: Path) -> None:
        self.count += 1
        assert not list(folder.iterdir())
        (folder / "engine").write_bytes(self._content)


def test_built_engine_is_found_by_its_key(tmp_path: Path) -> None:
    build = Builder()
    first = EngineCache(tmp_path).obtain(KEY, build, Stop())
    assert EngineCache(tmp_path).obtain(dict(reversed(KEY.items())), build, Stop()) == first
    assert EngineCache(tmp_path).find(KEY, Stop()) == first
    assert (build.count, (first / "engine").read_bytes()) == (1, b"engine")
    assert EngineCache(tmp_path).find({**KEY, "gpu": "b"}, Stop()) is None


def rewrite(entry: Path) -> None:
    """Another engine, with a record that fits it, in the place of another key's."""
    other = EngineCache(entry.parent).obtain({"gpu": "b"}, Builder(b"another"), Stop())
    shutil.rmtree(entry)
    shutil.copytree(other, entry)


def link(entry: Path) -> None:
    (entry / "engine").rename(entry.parent / "moved")
    (entry / "engine").symlink_to(entry.parent / "moved")


def replace_by_file(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("a file")


def drop_engine_from_record(entry: Path) -> None:
    record = json.loads((entry / "record.json").read_text())
    del record["files"]["engine"]
    (entry / "record.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "engine").write_bytes(b"enginf"),
        lambda entry: (entry / "engine").unlink(),
        lambda entry: (entry / "more").touch(),
        lambda entry: (entry / "record.json").unlink(),
        lambda entry: (entry / "record.json").write_text("[]"),
        lambda entry: (entry / "key.json").write_text("{}"),
        replace_by_file,
        drop_engine_from_record,
        link,
        rewrite,
    ],
    ids=[
        "changed",
        "gone",
        "more",
        "no record",
        "no good record",
        "another key",
        "a file",
        "a short record",
        "a link",
        "foreign",
    ],
)
def test_damaged_engines_are_rebuilt(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    cache, build = EngineCache(tmp_path), Builder()
    entry = cache.obtain(KEY, build, Stop())
    damage(entry)
    assert cache.obtain(KEY, build, Stop()) == entry
    assert (build.count, (entry / "engine").read_bytes()) == (2, b"engine")
    damage(entry)
    assert cache.find(KEY, Stop()) is None
    assert not entry.exists()


def test_failed_build_leaves_no_files(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "engine").touch()
        raise BundleError("told to")

    with pytest.raises(BundleError, match="told to"):
        EngineCache(tmp_path).obtain(KEY, fail, Stop())
    assert [path.name for path in tmp_path.iterdir()] == ["locks"]


def test_cache_entry_appears_only_once_complete(tmp_path: Path) -> None:
    """While it is built there is nothing under its name; the record, written last, has every file's SHA-256."""
    entry = tmp_path / digest_of(KEY)

    def build(folder: Path) -> None:
        assert not entry.exists()
        Builder()(folder)

    EngineCache(tmp_path).obtain(KEY, build, Stop())
    record = json.loads((entry / "record.json").read_text())
    assert record["files"] == {name: sha256_of(entry / name) for name in ("engine", "key.json")}


def test_concurrent_servers_build_an_engine_once(tmp_path: Path) -> None:
    begun, go, build = threading.Event(), threading.Event(), Builder()
    found: list[Path] = []

    def slowly(folder: Path) -> None:
        begun.set()
        assert go.wait(60)
        build(folder)

    threads = [threading.Thread(target=lambda: found.append(EngineCache(tmp_path).obtain(KEY, slowly, Stop()))) for _ in range(2)]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    go.set()
    for thread in threads:
        thread.join(60)
    assert build.count == 1
    assert found[0] == found[1]


def test_waiting_for_another_servers_build_can_be_stopped(tmp_path: Path) -> None:
    stop = Stop()

    def meanwhile(folder: Path) -> None:
        stop.ask()
        with pytest.raises(Stopped):
            EngineCache(tmp_path).obtain(KEY, Builder(), stop)
        Builder()(folder)

    EngineCache(tmp_path).obtain(KEY, meanwhile, Stop())


@pytest.mark.parametrize("bounds", [{"most_entries": 2}, {"most_bytes": 2500}])
def test_least_recently_used_engines_are_evicted(tmp_path: Path, bounds: dict[str, int]) -> None:
    cache, keys = EngineCache(tmp_path, **bounds), [{"gpu": name} for name in "abc"]
    for seconds, key in enumerate(keys):
        entry = cache.obtain(key, Builder(b"x" * 1000), Stop())
        os.utime(entry / "record.json", (seconds, seconds))
    assert [cache.find(key, Stop()) is not None for key in keys] == [False, True, True]
    others = [tmp_path / name for name in ("choices", "openvino", "of-a-later-version", "notes.txt")]
    for path in others:
        path.mkdir()
    (tmp_path / f"{digest_of(KEY)}.building").mkdir()
    cache.obtain(keys[1], Builder(), Stop())
    cache.obtain(keys[0], Builder(b"x" * 1000), Stop())
    assert [cache.find(key, Stop()) is not None for key in keys] == [True, True, False]
    assert not list(tmp_path.glob("*.building"))
    assert all(path.is_dir() for path in others), "what is no engine stays"


def test_default_folder_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "img2img" / "engines"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for relative in ("", "cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert default_root() == tmp_path / "home" / ".cache" / "img2img" / "engines"


def test_engine_cache_folder_is_private_to_its_owner(tmp_path: Path) -> None:
    EngineCache(tmp_path / "engines").obtain(KEY, Builder(), Stop())
    assert (tmp_path / "engines").stat().st_mode & 0o077 == 0


_HOLDER = """
import sys
from img2img_server.runtime.tensorrt.build import read_job, report_to_parent
job = read_job()
held = open(job["held"], "w")
held.write("holding"), held.flush()
open(job["never"]).read()
"""
_WAITER = """
from img2img_server.runtime.tensorrt.build import read_job, report_to_parent
job = read_job()
report_to_parent(progress=0)
open(job["never"]).read()
"""
_PARENT = """
import sys
from img2img_server.runtime.tensorrt.build import run_build
from img2img_server.support.cancellation import Stop
run_build([sys.executable, "-c", sys.argv[1]], {"held": sys.argv[2], "never": sys.argv[3]}, lambda step, done: None, Stop())
"""


@pytest.fixture
def pipes(tmp_path: Path) -> tuple[str, str]:
    """Two named pipes: one that a builder holds open as long as it lives, and one that it waits for in vain."""
    paths = [str(tmp_path / name) for name in ("held", "never")]
    for path in paths:
        os.mkfifo(path)
    return paths[0], paths[1]


def test_build_process_ends_with_the_server(pipes: tuple[str, str]) -> None:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, _HOLDER, *pipes])
    with open(pipes[0]) as held:  # noqa: PTH123 - a named pipe
        assert held.read(7) == "holding"
        parent.kill()
        parent.wait(60)
        assert held.read() == "", "the builder is gone"


def test_stopped_build_is_killed(pipes: tuple[str, str]) -> None:
    stop = Stop()
    with pytest.raises(Stopped):
        run_build([sys.executable, "-c", _WAITER], {"never": pipes[1]}, lambda *_: stop.ask(), stop)


def test_build_stopped_before_its_start_never_starts(tmp_path: Path) -> None:
    stop = Stop()
    stop.ask()
    with pytest.raises(Stopped):
        run_build([str(tmp_path / "no such program")], {}, lambda *_: None, stop)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os; os.abort()", "the build was killed by SIGABRT"),
        ("raise SystemExit(3)", "the build ended with status 3"),
        ('print(\'{"problem": "no room"}\'); raise SystemExit(1)', "the build failed: no room"),
    ],
)
def test_failed_build_reports_the_reason(code: str, why: str) -> None:
    with pytest.raises(BundleError, match=why):
        run_build([sys.executable, "-c", code], {}, lambda *_: None, Stop())

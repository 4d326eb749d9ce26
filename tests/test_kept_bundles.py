"""Bundles that are kept between runs: built once, built again if they are damaged, and old ones removed."""

import os
import sys
from pathlib import Path

import kept_bundles
import pytest

DIGEST = "of today"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kept_bundles, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(kept_bundles, "REPOSITORY", tmp_path)
    monkeypatch.setattr(kept_bundles, "digest", lambda: DIGEST)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    return tmp_path / "kept"


def get(session: Path) -> Path:
    """One whose builder writes a line each time that it is called."""

    def build(output: Path) -> None:
        output.mkdir()
        with (session / "calls").open("a") as calls:
            calls.write("built\n")
        (output / "file").write_text("whole")

    return kept_bundles.kept(session, "bundles/one", lambda found: (found / "file").read_text() == "whole", build)


def calls(session: Path) -> int:
    return len((session / "calls").read_text().splitlines())


def test_kept_bundles_are_found_by_the_next_run(store: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert get(tmp_path) == store / DIGEST / "bundles" / "one"
    assert calls(tmp_path) == 1


def test_damaged_kept_bundles_are_rebuilt(store: Path, tmp_path: Path) -> None:
    (get(tmp_path) / "file").write_text("half")
    assert (get(tmp_path) / "file").read_text() == "whole"
    assert calls(tmp_path) == 2


def test_another_environment_reads_but_does_not_write_the_cache(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv-cuda"))
    assert get(tmp_path) == tmp_path / "bundles" / "one"
    assert not store.exists()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    own = get(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv-cuda"))
    assert get(tmp_path) == own == store / DIGEST / "bundles" / "one"


def test_old_kept_bundles_are_removed(store: Path, tmp_path: Path) -> None:
    for index, name in enumerate(("oldest", "old", "beside")):
        (store / name).mkdir(parents=True)
        os.utime(store / name, (index, index))
    get(tmp_path)
    assert {path.name for path in store.iterdir()} == {"beside", DIGEST}


def test_cache_digest_covers_sources_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_bundles, "REPOSITORY", tmp_path)
    (tmp_path / "tests").mkdir()
    digest, seen = kept_bundles.digest.__wrapped__, set()
    for change in (
        lambda: None,
        lambda: (tmp_path / "tests" / "tiny_models.py").write_text("one"),
        lambda: (tmp_path / "tests" / "tiny_models.py").write_text("other"),
        lambda: monkeypatch.setattr(kept_bundles, "version", lambda package: "1.0+cpu"),
    ):
        change()
        assert digest() == digest()
        seen.add(digest())
    assert len(seen) == 4
    monkeypatch.setattr(kept_bundles, "version", lambda package: "1.0")
    assert digest() in seen, "a build of the same version"

"""Staging: a bundle appears completely or not at all, and nothing else is ever replaced."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from img2img_export.errors import ExportError
from img2img_export.publish.staging import check_replaceable, stage, sweep

BUNDLE_MANIFEST = json.dumps({"format_version": 1, "pipeline_class": "P"})

_BUILD_FOREVER = """
import sys, time
from pathlib import Path
from img2img_export.publish.staging import stage
with stage(Path(sys.argv[1])) as staging:
    (staging.bundle / "manifest.json").write_text("{}")
    print("building", flush=True)
    time.sleep(600)
"""


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def build_and_fail(output: Path) -> None:
    with stage(output) as staging:
        (staging.bundle / "file").write_text("new")
        raise InterruptedError


def test_a_bundle_appears_only_when_published(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "model"
    with stage(output) as staging:
        (staging.bundle / "file").write_text("new")
        assert not output.exists()
        assert staging.bundle.stat().st_dev == output.parent.stat().st_dev
        staging.publish()
        assert (output / "file").read_text() == "new"
    assert names(output.parent) == ["model"]


def test_failure_keeps_the_old_bundle_and_leaves_no_files(tmp_path: Path) -> None:
    output = tmp_path / "model"
    output.mkdir()
    (output / "file").write_text("old")
    with pytest.raises(InterruptedError):
        build_and_fail(output)
    assert (output / "file").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_publishing_replaces_the_old_bundle(tmp_path: Path) -> None:
    output = tmp_path / "model"
    output.mkdir()
    (output / "old").touch()
    with stage(output) as staging:
        (staging.bundle / "new").touch()
        staging.publish()
    assert names(output) == ["new"]
    assert names(tmp_path) == ["model"]


def test_concurrent_export_to_the_same_output_is_refused(tmp_path: Path) -> None:
    with stage(tmp_path / "model"):
        with pytest.raises(ExportError, match="running"), stage(tmp_path / "model"):
            pass
        with stage(tmp_path / "other"):
            pass


def kill_a_build(output: Path, *, and_its_janitor: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", _BUILD_FOREVER, str(output)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "building\n"
        with pytest.raises(ExportError, match="running"), stage(output):
            pass
        (janitor,) = psutil.Process(process.pid).children()
        if and_its_janitor:
            janitor.kill()
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs([janitor], timeout=60)


def test_leftovers_of_a_killed_export_are_removed(tmp_path: Path) -> None:
    kill_a_build(tmp_path / "mod[e]l", and_its_janitor=False)
    assert names(tmp_path) == []


def test_a_stale_staging_directory_is_removed_by_the_next_export(tmp_path: Path) -> None:
    output = tmp_path / "mod[e]l"
    kill_a_build(output, and_its_janitor=True)
    assert not output.exists()
    assert all(name.startswith(".") for name in names(tmp_path))
    assert not list(tmp_path.glob(".*/manifest.json")), "a directory beside the output looks like a bundle"
    with stage(output) as staging:
        assert names(tmp_path) == sorted([staging.root.name, f".{output.name}.img2img-export.lock"])
    assert names(tmp_path) == []


def test_interrupted_replacement_restores_the_old_bundle(tmp_path: Path) -> None:
    litter = tmp_path / ".model.img2img-export.1" / "replaced"
    litter.mkdir(parents=True)
    (litter / "file").write_text("old")
    sweep(tmp_path / "model")
    assert (tmp_path / "model" / "file").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_missing_or_empty_output_may_be_written(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "nothing", force=False)
    check_replaceable(tmp_path, force=False)


def test_bundle_is_replaced_only_with_force(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(BUNDLE_MANIFEST)
    with pytest.raises(ExportError, match="--force"):
        check_replaceable(tmp_path, force=False)
    check_replaceable(tmp_path, force=True)


@pytest.mark.parametrize("content", [None, "{}", "[", '{"name": "an extension of a browser"}'])
def test_directories_other_than_bundles_are_never_replaced(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "holiday.jpg").touch()
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    for force in (False, True):
        with pytest.raises(ExportError, match="never replaced"):
            check_replaceable(tmp_path, force)


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="never replaced"):
        check_replaceable(tmp_path / "file", force=True)

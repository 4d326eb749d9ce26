"""An export killed at any moment leaves the previous bundle or none, and no other files."""

import gc
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path

import psutil
import pytest
from img2img_cli.__main__ import main
from img2img_export.build import export_model
from img2img_export.options import ExportOptions
from img2img_export.progress import Advance, Progress
from short_exports import cut_short


class Killer(Progress):
    """Kills its own process at the `moment`-th progress report; with -1 it counts the reports into a file instead."""

    def __init__(self, moment: int, file: Path) -> None:
        self.moment, self.file, self.told = moment, file, 0

    def stage(self, text: str) -> None:
        self._tell()

    @contextmanager
    def task(self, label: str, total: int, unit: str = "B") -> Iterator[Advance]:
        yield lambda count: self._tell()

    def _tell(self) -> None:
        self.told += 1
        self.file.write_text(str(self.told))
        if self.told == self.moment:
            os.kill(os.getpid(), signal.SIGKILL)


def run(source: Path, output: Path, moment: int, file: Path) -> None:
    gc.freeze()
    with cut_short():
        export_model(ExportOptions(source=str(source), output=output), Killer(moment, file))


@pytest.fixture(scope="module")
def libraries() -> ForkServerContext:
    """Starts processes that have the libraries loaded: once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["img2img_export.attempts", "test_interruptions", "optimum.exporters.base"])
    return context


@pytest.fixture(scope="module")
def export_in_a_process(
    libraries: ForkServerContext, tiny_model: Callable[[str], Path]
) -> Callable[[Path, int, Path], int | None]:
    """Exports in a process of its own, and gives its exit status."""
    source = tiny_model("sd1")

    def start(output: Path, moment: int, file: Path) -> int | None:
        process = libraries.Process(target=run, args=(source, output, moment, file))
        process.start()
        process.join()
        # Who clears up may still be at it.
        clearing = [found for found in psutil.process_iter(["cmdline"]) if str(output) in (found.info["cmdline"] or ())]
        psutil.wait_procs(clearing, timeout=60)
        return process.exitcode

    return start


@pytest.mark.parametrize("moments", [3, pytest.param(10, marks=pytest.mark.nightly)])
def test_kill_at_any_moment_leaves_no_bundle_after_cleanup(
    moments: int, export_in_a_process: Callable[[Path, int, Path], int | None], tmp_path: Path
) -> None:
    """Killed at the first progress report, at the last, and at some between them."""
    folder, count = tmp_path / "bundles", tmp_path / "count"
    assert export_in_a_process(folder / "whole", -1, count) == 0
    told = int(count.read_text())
    assert told > 10 * moments, "there must be moments to choose from"
    for index in range(moments):
        moment = 1 + index * (told - 1) // (moments - 1)
        assert export_in_a_process(folder / "model", moment, count) == -signal.SIGKILL, "it must not have come to its end"
        assert int(count.read_text()) == moment
        assert [path.name for path in folder.iterdir()] == ["whole"], f"killed at moment {moment} of {told}"


def run_command(words: list[str], output: Path) -> None:
    """Runs the command as on a terminal, and writes its output to the pipe `output`."""
    # A shell's background jobs, perhaps this test, ignore this signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(output, os.O_WRONLY), sys.stdout.fileno())
    with cut_short():
        sys.exit(main(words))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_export_and_removes_its_files(
    number: int, libraries: ForkServerContext, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    output, folder = tmp_path / "output.pipe", tmp_path / "bundles"
    os.mkfifo(output)
    words = ["export", str(tiny_model("sd1")), "--output", str(folder / "out"), "--json"]
    process = libraries.Process(target=run_command, args=(words, output))
    process.start()
    with output.open() as lines:
        for line in lines:
            if "tracing" in json.loads(line).get("text", ""):
                assert process.pid is not None
                os.kill(process.pid, number)
                break
        lines.read()  # until the process that cleans up has ended, too
    process.join()
    assert process.exitcode == {signal.SIGTERM: 143, signal.SIGINT: 130}[signal.Signals(number)]
    assert list(folder.iterdir()) == []

"""Progress output: each stage and task is reported once, long tasks at intervals, in each of the formats."""

import io
import json
import re
import threading
from typing import Any

import pytest
from img2img_export.cli.terminal import Display, JsonProgress, PlainProgress, RichProgress, amount, as_json, choose, quantity
from img2img_export.progress import Progress
from rich.console import Console


class Clock:
    """A manual clock."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_long_task(display: Display, clock: Clock) -> None:
    """A minute, in 600 parts of a megabyte."""
    display.stage("loading")
    with display.task("hashing", 600_000_000) as advance:
        for _ in range(600):
            clock.now += 0.1
            advance(1_000_000)


def test_base_progress_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.stage("loading")
    with progress.task("hashing", 10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")


def test_plain_progress_prints_a_line_every_ten_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    run_long_task(PlainProgress(stream, clock), clock)
    first, *running, last = stream.getvalue().splitlines()
    assert first == "    0.0 s  loading"
    assert last == "   60.0 s  hashing: 600 MB in 60.0 s"
    seconds = [float(line.split()[0]) for line in running]
    assert 4 <= len(seconds) <= 6
    assert all(later - earlier >= 9.9 for earlier, later in zip([0.0, *seconds], seconds, strict=False))
    assert all(re.fullmatch(r" +\d+\.\d s  hashing: \d+ MB of 600 MB \(\d+%\)", line) for line in running)


def test_failed_task_prints_no_completion() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), PlainProgress(stream).task("hashing", 10):
        raise KeyboardInterrupt
    assert stream.getvalue() == ""


def test_json_progress_is_one_object_per_line() -> None:
    stream, clock = io.StringIO(), Clock()
    display = JsonProgress(stream, clock)
    run_long_task(display, clock)
    display.result("exported: models/m", {"path": "models/m", "up_to_date": False})
    display.error("no\nway")
    first, *running, result, error = map(json.loads, stream.getvalue().splitlines())
    assert first == {"event": "stage", "text": "loading", "seconds": 0.0}
    assert result == {"event": "result", "path": "models/m", "up_to_date": False}
    assert error == {"event": "error", "message": "no\nway"}
    assert len(running) <= 60 / 0.5 + 1
    assert [part["done"] for part in running] == sorted(part["done"] for part in running)
    assert running[-1] == {
        "event": "progress",
        "label": "hashing",
        "done": 600_000_000,
        "total": 600_000_000,
        "unit": "B",
        "seconds": 60.0,
    }


def test_non_finite_numbers_become_null() -> None:
    assert json.loads(as_json({"a": [float("inf"), 1.5], "b": {"c": float("nan")}})) == {"a": [None, 1.5], "b": {"c": None}}


def test_bars_show_bytes_and_stages_keep_their_lines() -> None:
    stream, clock = Terminal(), Clock()
    display = RichProgress(stream, clock, Console(file=stream, force_terminal=True, width=120, color_system=None))
    run_long_task(display, clock)
    with display.task("drawing", 4, "images") as advance:
        display.stage("[drawing] while a bar runs")
        advance(4)
    display.result("done: [m]", {})
    text = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", stream.getvalue())
    assert "600 MB of 600 MB" in text
    assert "4 images of 4 images" in text
    assert text.count("loading") == 1
    assert "[drawing] while a bar runs\n" in text
    assert text.endswith("done: [m]\n")


def test_failed_task_restores_the_terminal() -> None:
    stream = Terminal()
    display = RichProgress(stream, console=Console(file=stream, force_terminal=True, width=120))
    with pytest.raises(KeyboardInterrupt), display.task("outer", 10), display.task("inner", 10):
        raise KeyboardInterrupt
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert stream.getvalue().rindex(hidden) < stream.getvalue().rindex(shown)


@pytest.mark.parametrize("kind", [PlainProgress, JsonProgress, RichProgress])
def test_threads_may_share_a_task(kind: Any) -> None:
    stream = io.StringIO()
    with kind(stream).task("downloading", 4000) as advance:
        threads = [threading.Thread(target=lambda: [advance(1) for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert re.search(r"4\.00 kB|4000", stream.getvalue())


def test_progress_type_is_chosen_by_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert type(choose(False, io.StringIO())) is PlainProgress
    assert type(choose(False, Terminal())) is RichProgress
    assert type(choose(True, Terminal())) is JsonProgress
    monkeypatch.setenv("TERM", "dumb")
    assert type(choose(False, Terminal())) is PlainProgress


@pytest.mark.parametrize(
    ("count", "unit", "text"),
    [
        (0, "B", "0 B"),
        (999, "B", "999 B"),
        (1500, "B", "1.50 kB"),
        (63_400_000, "B", "63.4 MB"),
        (3.44e9, "B", "3.44 GB"),
        (7, "images", "7 images"),
    ],
)
def test_quantities_have_short_units(count: float, unit: str, text: str) -> None:
    assert quantity(count, unit) == text
    assert amount(count, count, unit) == f"{text} of {text}"

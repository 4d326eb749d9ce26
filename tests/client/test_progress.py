"""How a request's progress is shown: a bar on a terminal, lines in a file."""

import io

from img2img_client import Completed, Progress, Queued, Started, TransformEvent
from img2img_client.progress import show_progress
from rich.console import Console


def run_events() -> list[TransformEvent]:
    """A long run's events, but for the last."""
    return [Queued(0), Started(7, "onnx:cpu[bold]"), *(Progress(step, 40) for step in range(1, 41))]


def test_a_terminal_gets_a_bar() -> None:
    file = io.StringIO()
    with show_progress(Console(file=file, force_terminal=True, width=100, color_system=None)) as show:
        for event in run_events():
            show(event)
    assert any("running on onnx:cpu[bold], seed 7" in line and "40/40" in line for line in file.getvalue().splitlines())


def test_remaining_time_is_shown_if_known() -> None:
    estimated: list[TransformEvent] = [
        Queued(0, 7.0),
        Queued(2, 7.0),
        Started(7, "onnx:cpu"),
        Progress(1, 2, eta_seconds=3.4),
        Progress(2, 2),
    ]
    bar, lines = io.StringIO(), io.StringIO()
    with show_progress(Console(file=bar, force_terminal=True, width=120, color_system=None)) as show:
        for event in estimated[:-1]:
            show(event)
    assert "about 3 s left" in bar.getvalue()
    with show_progress(Console(file=lines)) as show:
        for event in estimated:
            show(event)
    assert lines.getvalue().splitlines() == [
        "queued, next, done in about 7 s",
        "queued, 2 ahead, done in about 7 s",
        "running on onnx:cpu, seed 7",
        "step 1 of 2, about 3 s left",
        "step 2 of 2",
    ]


def test_a_file_gets_few_lines() -> None:
    file = io.StringIO()
    with show_progress(Console(file=file, width=20)) as show:
        for event in run_events():
            show(event)
    lines = file.getvalue().splitlines()
    assert lines[:3] == ["queued, next", "running on onnx:cpu[bold], seed 7", "step 4 of 40"]
    assert lines[-1] == "step 40 of 40"
    assert len(lines) == 12


def test_completed_event_prints_nothing() -> None:
    file = io.StringIO()
    with show_progress(Console(file=file)) as show:
        show(Completed(result=None))  # type: ignore[arg-type]
    assert file.getvalue() == ""

"""Progress of a running export: bars on a terminal, plain lines for a log, or JSON lines for a program."""

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from img2img_export.progress import Advance, Progress

if TYPE_CHECKING:
    import rich.progress
    from rich.console import Console

_PLAIN_INTERVAL = 10.0
"""Seconds between two plain lines of a task."""
_JSON_INTERVAL = 0.5
"""Seconds between two JSON lines of a task."""

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class Display(Progress):
    """Progress that is displayed. It also displays the result of the export."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream = stream
        self.clock = clock
        self._start = clock()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self.clock() - self._start

    def result(self, line: str, record: Mapping[str, Any]) -> None:
        """Displays success: `line` is text, `record` the same as data."""
        print(line, file=self.stream, flush=True)

    def error(self, message: str) -> None:
        """Displays failure. Text displays do nothing: the command prints the message on standard error."""


class PlainProgress(Display):
    """Lines for a log: one per stage start and task end, and one every ten seconds during a long task."""

    def stage(self, text: str) -> None:
        """Prints the stage with the time."""
        self._print(text)

    @contextlib.contextmanager
    def task(self, label: str, total: int, unit: str = "B") -> Iterator[Advance]:
        """Prints a line every ten seconds, and one at the end with size and duration."""
        begin = self.seconds

        def report(done: int) -> None:
            part = f" ({done / total:.0%})" if total else ""
            self._print(f"{label}: {amount(done, total, unit)}{part}")

        counter = _Counter(self.clock, _PLAIN_INTERVAL, report)
        yield counter.advance
        self._print(f"{label}: {quantity(counter.done, unit)} in {self.seconds - begin:.1f} s")

    def _print(self, text: str) -> None:
        print(f"{self.seconds:7.1f} s  {text}", file=self.stream, flush=True)


class JsonProgress(Display):
    """One JSON object per line: stage, progress, and finally result or error."""

    def stage(self, text: str) -> None:
        """{"event": "stage", "text", "seconds"}."""
        self._print("stage", text=text, seconds=round(self.seconds, 3))

    @contextlib.contextmanager
    def task(self, label: str, total: int, unit: str = "B") -> Iterator[Advance]:
        """{"event": "progress", "label", "done", "total", "unit", "seconds"}, at most twice a second and at the end."""

        def report(done: int) -> None:
            self._print("progress", label=label, done=done, total=total, unit=unit, seconds=round(self.seconds, 3))

        counter = _Counter(self.clock, _JSON_INTERVAL, report)
        yield counter.advance
        report(counter.done)

    def result(self, line: str, record: Mapping[str, Any]) -> None:
        """{"event": "result", ...record}."""
        self._print("result", **record)

    def error(self, message: str) -> None:
        """{"event": "error", "message"}."""
        self._print("error", message=message)

    def _print(self, event: str, **fields: Any) -> None:
        print(as_json({"event": event, **fields}), file=self.stream, flush=True)


class RichProgress(Display):
    """Bars for a terminal, kept on screen when complete; stages are lines above them."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic, console: "Console | None" = None) -> None:
        from rich.console import Console

        super().__init__(stream, clock)
        self._console = console or Console(file=stream)
        self._bars: rich.progress.Progress | None = None
        self._open = 0
        self._lock = threading.Lock()

    def stage(self, text: str) -> None:
        """Prints the stage with the time."""
        from rich.text import Text

        self._console.print(Text.assemble((f"{self.seconds:7.1f} s  ", "dim"), text))

    def result(self, line: str, record: Mapping[str, Any]) -> None:
        """Prints the line without wrapping or markup, since it may contain file names."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def task(self, label: str, total: int, unit: str = "B") -> Iterator[Advance]:
        """Shows a bar. Concurrent bars share a display, which closes with the last of them."""
        with self._display() as bars:
            task = bars.add_task(label, total=total, unit=unit)
            yield lambda count: bars.advance(task, count)
            # A completed bar is full even if its total was estimated wrong.
            bars.update(task, total=next(bar.completed for bar in bars.tasks if bar.id == task))

    @contextlib.contextmanager
    def _display(self) -> "Iterator[rich.progress.Progress]":
        with self._lock:
            if self._bars is None:
                self._bars = _make_bars(self._console)
                self._bars.start()
            self._open += 1
            bars = self._bars
        try:
            yield bars
        finally:
            with self._lock:
                self._open -= 1
                if not self._open:
                    bars.stop()
                    self._bars = None


def choose(json: bool, stream: TextIO) -> Display:
    """JSON if requested, bars on a terminal, else plain lines."""
    if json:
        return JsonProgress(stream)
    if not stream.isatty():
        return PlainProgress(stream)
    from rich.console import Console

    console = Console(file=stream)
    return PlainProgress(stream) if console.is_dumb_terminal else RichProgress(stream, console=console)


def quantity(count: float, unit: str = "B") -> str:
    """A count with its unit; bytes as kB, MB, GB or TB (of 1000), with about three digits."""
    if unit != "B":
        return f"{count:.0f} {unit}"
    for size, name in _UNITS:
        if count >= size:
            return f"{count / size:.{_digits(count / size)}f} {name}"
    return f"{count:.0f} B"


def amount(done: float, total: float, unit: str = "B") -> str:
    """The text "DONE of TOTAL"."""
    return f"{quantity(done, unit)} of {quantity(total, unit)}"


def as_json(value: Any) -> str:
    """One line of strict JSON: NaN and infinite numbers become null."""
    return json.dumps(_finite(value), default=str, ensure_ascii=False, allow_nan=False)


def _digits(value: float) -> int:
    return 2 if value < 10 else 1 if value < 100 else 0


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


class _Counter:
    """Counts progress and reports it at most every `interval` seconds. Thread-safe."""

    def __init__(self, clock: Callable[[], float], interval: float, report: Callable[[int], None]) -> None:
        self.done = 0
        self._clock, self._interval, self._report = clock, interval, report
        self._reported = clock()
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        with self._lock:
            self.done += count
            if self._clock() - self._reported >= self._interval:
                self._reported = self._clock()
                self._report(self.done)


def _make_bars(console: "Console") -> "rich.progress.Progress":
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Amount(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(amount(task.completed, task.total or 0, task.fields["unit"]), style="progress.download")

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{quantity(speed, task.fields['unit'])}/s" if speed else "", style="progress.data.speed")

    label = TextColumn("{task.description}", markup=False)
    return Progress(label, BarColumn(), Amount(), Speed(), TimeElapsedColumn(), console=console)

"""Shows the progress of a request: a bar on a terminal, otherwise plain lines."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from img2img_client.values import Progress, Queued, Started, TransformEvent

if TYPE_CHECKING:
    from rich.console import Console

Show = Callable[[TransformEvent], None]
"""A function that displays an event."""

_PLAIN_LINES = 10


@contextmanager
def show_progress(console: "Console | None" = None) -> Iterator[Show]:
    """Yields a function to call with each event. Writes to `console`, by default standard error."""
    from rich.console import Console

    console = console or Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield lambda event: _show_line(console, event)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    description, left = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[left]}", markup=False)
    with Bar(description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), left, console=console) as bar:
        task = bar.add_task("connecting", total=None, left="")

        def show(event: TransformEvent) -> None:
            match event:
                case Progress(step=step, step_count=step_count):
                    bar.update(task, completed=step, total=step_count, left=_left(event))
                case _ if text := describe(event):
                    bar.update(task, description=text)

        yield show


def describe(event: TransformEvent) -> str:
    """The event in a few words; "" for Progress and Completed, which are displayed otherwise."""
    match event:
        case Queued(position=position, eta_seconds=eta):
            ahead = f"{position} ahead" if position else "next"
            return f"queued, {ahead}" if eta is None else f"queued, {ahead}, done in about {eta:.0f} s"
        case Started(engine=engine, seed=seed):
            return f"running on {engine}, seed {seed}"
    return ""


def _left(event: Progress) -> str:
    return "" if event.eta_seconds is None else f"about {event.eta_seconds:.0f} s left"


def _show_line(console: "Console", event: TransformEvent) -> None:
    """Prints a line for the event; for steps, about ten lines per request."""
    line = describe(event)
    if isinstance(event, Progress):
        step, count = event.step, event.step_count
        if step == count or step * _PLAIN_LINES // count > (step - 1) * _PLAIN_LINES // count:
            line = ", ".join(filter(None, (f"step {step} of {count}", _left(event))))
    if line:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

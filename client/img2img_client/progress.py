"""Shows how a request goes: a bar on a terminal, plain lines anywhere else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from img2img_client.values import Progress, Queued, Started, TransformEvent

if TYPE_CHECKING:
    from rich.console import Console

Show = Callable[[TransformEvent], None]
"""What takes each event as it comes."""

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

    said, left = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[left]}", markup=False)
    with Bar(said, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), left, console=console) as bar:
        task = bar.add_task("connecting", total=None, left="")

        def show(event: TransformEvent) -> None:
            match event:
                case Progress(step=step, step_count=step_count):
                    bar.update(task, completed=step, total=step_count, left=_left(event))
                case _ if description := describe(event):
                    bar.update(task, description=description)

        yield show


def describe(event: TransformEvent) -> str:
    """The event in a few words; "" for a step and for the end, which speak for themselves."""
    match event:
        case Queued(position=position, eta_seconds=eta):
            place = f"{position} before this one" if position else "next in turn"
            return f"queued, {place}" if eta is None else f"queued, {place}, done in about {eta:.0f} s"
        case Started(engine=engine, seed=seed):
            return f"running on {engine}, seed {seed}"
    return ""


def _left(event: Progress) -> str:
    return "" if event.eta_seconds is None else f"about {event.eta_seconds:.0f} s left"


def _show_line(console: "Console", event: TransformEvent) -> None:
    """A line for the event; of the steps, about every tenth part of them."""
    line = describe(event)
    if isinstance(event, Progress):
        step, count = event.step, event.step_count
        if step == count or step * _PLAIN_LINES // count > (step - 1) * _PLAIN_LINES // count:
            line = ", ".join(filter(None, (f"step {step} of {count}", _left(event))))
    if line:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

"""Progress of an export. The base class is silent; cli/terminal.py has the displays. Standard library only."""

import contextlib
from collections.abc import Callable, Iterator

Advance = Callable[[int], None]
"""Called with the number of further bytes (or steps) done."""


class Progress:
    """Silent progress: stages have a short text, tasks have a known total."""

    def stage(self, text: str) -> None:
        """Starts the stage `text` and ends the previous one."""

    @contextlib.contextmanager
    def task(self, label: str, total: int, unit: str = "B") -> Iterator[Advance]:
        """Runs a task of `total` bytes (or steps, in another `unit`). Call the yielded function at each advance."""
        yield lambda count: None

"""How an export tells what it is doing. The base class is silent; a person's terminal, plain lines and JSON are others.

Standard library only.
"""

import contextlib
from collections.abc import Callable, Iterator

Advance = Callable[[int], None]
"""Told how many more bytes (or steps) are done."""


class Progress:
    """Says nothing. What an export says to it: stages in a few words, and tasks whose end is known."""

    def stage(self, text: str) -> None:
        """The stage `text` begins, and the one before is over."""

    @contextlib.contextmanager
    def task(self, label: str, total: int, unit: str = "B") -> Iterator[Advance]:
        """A task of `total` bytes (or steps: any other `unit`). The function that it gives is told of each advance."""
        yield lambda count: None

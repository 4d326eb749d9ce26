"""What was asked and what came of it: each operation begins once and ends once, or the run has failed."""

import itertools
import time
from collections import Counter
from dataclasses import dataclass, field

_SHOWN = 20
"""Violations that are kept in words; the others are counted."""


class Violated(Exception):
    """An answer that breaks a promise. The message says which."""


@dataclass(slots=True)
class Ledger:
    """Operations by kind and ending, and the promises that were broken."""

    endings: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(kind, ending) -> how often."""
    issued: Counter[str] = field(default_factory=Counter)
    """Kind -> how often it was begun."""
    violations: list[str] = field(default_factory=list)
    violation_count: int = 0
    doubled: int = 0
    """Operations that ended more than once."""
    _open: dict[int, tuple[str, float]] = field(default_factory=dict)
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def begin(self, kind: str) -> int:
        """A number for a new operation."""
        number = next(self._numbers)
        self.issued[kind] += 1
        self._open[number] = (kind, time.monotonic())
        return number

    def end(self, number: int, ending: str) -> None:
        """Notes how an operation ended."""
        if number not in self._open:
            self.doubled += 1
            self.violate(f"operation {number} ended twice, the second time as {ending}")
            return
        kind, _ = self._open.pop(number)
        self.endings[kind, ending] += 1

    def violate(self, what: str) -> None:
        """Notes a broken promise."""
        self.violation_count += 1
        if len(self.violations) < _SHOWN:
            self.violations.append(what)

    @property
    def in_flight(self) -> int:
        """Operations that have not ended."""
        return len(self._open)

    @property
    def lost(self) -> int:
        """Operations that were begun and of which nothing was ever heard."""
        return sum(self.issued.values()) - sum(self.endings.values())

    def count(self, ending: str) -> int:
        """Operations of any kind with this ending."""
        return sum(times for (_, how), times in self.endings.items() if how == ending)

    def open_kinds(self) -> dict[str, float]:
        """The kinds of the operations that have not ended, with the age in seconds of the oldest."""
        now = time.monotonic()
        ages: dict[str, float] = {}
        for kind, begun in self._open.values():
            ages[kind] = max(ages.get(kind, 0.0), now - begun)
        return ages

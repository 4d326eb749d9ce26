"""A record of all operations: each must begin once and end once, or the run fails."""

import itertools
import time
from collections import Counter
from dataclasses import dataclass, field

_SHOWN = 20
"""Violations whose text is kept; further ones are only counted."""


class Violated(Exception):
    """An answer that violates a guarantee; the message says which."""


@dataclass(slots=True)
class Ledger:
    """Operations by kind and ending, and the violated guarantees."""

    endings: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(kind, ending) -> count."""
    issued: Counter[str] = field(default_factory=Counter)
    """Kind -> number of operations that began."""
    violations: list[str] = field(default_factory=list)
    violation_count: int = 0
    doubled: int = 0
    """Operations that ended more than once."""
    _open: dict[int, tuple[str, float]] = field(default_factory=dict)
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def begin(self, kind: str) -> int:
        """Records a new operation and returns its number."""
        number = next(self._numbers)
        self.issued[kind] += 1
        self._open[number] = (kind, time.monotonic())
        return number

    def end(self, number: int, ending: str) -> None:
        """Records the ending of an operation."""
        if number not in self._open:
            self.doubled += 1
            self.violate(f"operation {number} ended twice, the second time as {ending}")
            return
        kind, _ = self._open.pop(number)
        self.endings[kind, ending] += 1

    def violate(self, what: str) -> None:
        """Records a violated guarantee."""
        self.violation_count += 1
        if len(self.violations) < _SHOWN:
            self.violations.append(what)

    @property
    def in_flight(self) -> int:
        """Operations that have not ended."""
        return len(self._open)

    @property
    def lost(self) -> int:
        """Operations that began and never ended."""
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

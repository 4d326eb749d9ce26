"""Bounds how many lines of one kind the log gets: a client that is refused thousands of times must not fill it."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

INTERVAL = 10.0
"""Seconds in which lines of a kind are counted."""
MOST, MOST_INFO = 20, 200
"""Lines of one kind in an interval: of warnings, errors and refused calls, and of others."""
_KINDS = 1000
"""Kinds that are counted separately in an interval. All further kinds count as one."""


@dataclass(slots=True)
class _Count:
    last: logging.LogRecord
    passed: int = 0
    held: int = 0


class Repeats:
    """Decides which lines pass. A record's kind is its level, the place in the code that logs it, and its attribute `kind` if it
    has one; records whose `kind` is None always pass. `clock` is in seconds. A handler uses it under its lock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._counts: dict[object, _Count] = {}

    def passes(self, record: logging.LogRecord) -> bool:
        """Whether the line is written now; if not, `due` counts it in its summary."""
        kind = getattr(record, "kind", "")
        if kind is None:
            return True
        key: object = (record.name, record.levelno, record.pathname, record.lineno, kind)
        if key not in self._counts and len(self._counts) >= _KINDS:
            key = None
        count = self._counts.setdefault(key, _Count(record))
        if count.passed < (MOST if kind or record.levelno >= logging.WARNING else MOST_INFO):
            count.passed += 1
            return True
        count.held += 1
        count.last = record
        return False

    @property
    def holds(self) -> bool:
        """Whether lines were held back that `due` has not reported yet."""
        return any(count.held for count in self._counts.values())

    def due(self, now: bool = False) -> list[logging.LogRecord]:
        """A line for each kind of which lines were held back, once the interval is over, or `now`. A new interval then begins."""
        moment = self._clock()
        if not now and moment - self._began < INTERVAL:
            return []
        seconds, counts = moment - self._began, self._counts
        self._began, self._counts = moment, {}
        return [_summary(count, seconds) for count in counts.values() if count.held]


def _summary(count: _Count, seconds: float) -> logging.LogRecord:
    last = count.last
    text = "%d similar lines suppressed in %.0f s, the last: %s"
    summary = logging.LogRecord(
        last.name, last.levelno, last.pathname, last.lineno, text, (count.held, seconds, last.getMessage()), None
    )
    for name in ("request_id", "client", "method", "status", "reason"):
        if hasattr(last, name):
            setattr(summary, name, getattr(last, name))
    return summary

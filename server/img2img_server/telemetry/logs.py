"""The log on standard error, for people or for machines: each line knows the call that it belongs to, and is one line only.

Repeated lines are counted and summarized.
"""

import copy
import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from img2img_server.support.call import current

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


ACCESS = "img2img.access"
"""The logger that has a line for each call."""

_OURS = ("img2img", "img2img_server")
"""The loggers of this server; those of libraries write too much at DEBUG."""
_TEXT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_OF_A_CALL = ("request_id", "client", "method", "model", "status", "reason", "seconds")
"""Fields that a JSON line has where they are known, in order."""
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_ESCAPES |= {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def configure(log_format: str, log_level: str = "info") -> None:
    """Logs to standard error, as "text" or as "json", from `log_level` on ("debug" of our own packages alone), Python's warnings
    included. Called again, it takes the place of its former self."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(handler)
        handler.close()
    root.addHandler(_Handler(JsonFormatter() if log_format == "json" else TextFormatter()))
    level = logging.getLevelNamesMapping()[log_level.upper()]
    root.setLevel(max(level, logging.INFO))
    for name in _OURS:
        logging.getLogger(name).setLevel(level if level < logging.INFO else logging.NOTSET)
    logging.captureWarnings(True)


class _Handler(logging.StreamHandler[Any]):
    """The one that `configure` puts in, so that it finds it again. Repeated lines are counted and reported in one line."""

    def __init__(self, formatter: logging.Formatter, repeats: Repeats | None = None) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(formatter)
        self.addFilter(CallFilter())
        self._repeats = repeats or Repeats()
        self._timer: threading.Timer | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the line, unless there were too many of its kind, and what is due of those before."""
        self._tell_repeats()
        if self._repeats.passes(record):
            super().emit(record)
        elif self._timer is None:
            self._timer = threading.Timer(INTERVAL, self._interval_ended)
            self._timer.daemon = True
            self._timer.start()

    def close(self) -> None:
        """Writes the summaries that are due."""
        with self.lock or threading.RLock():
            self._tell_repeats(now=True)
            if self._timer is not None:
                self._timer.cancel()
        super().close()

    def _tell_repeats(self, now: bool = False) -> None:
        for summary in self._repeats.due(now):
            super().emit(summary)

    def _interval_ended(self) -> None:
        with self.lock or threading.RLock():
            self._timer = None
            self._tell_repeats(now=True)


class CallFilter(logging.Filter):
    """Gives each record the id, the client and the method of the call that is being answered, where it has none of its own.

    On the engine's thread there is no such call: what is logged there brings its `extra`.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Marks the record, and lets it pass."""
        call = current()
        for name, value in (("request_id", call.request_id), ("client", call.client), ("method", call.method)):
            if value and not hasattr(record, name):
                setattr(record, name, value)
        return True


class TextFormatter(logging.Formatter):
    """A line for people. Where it belongs to a call, the request's id is at its end.

    Control characters are escaped and a traceback is indented, so that nothing in a message can pass for a line of the log.
    """

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def format(self, record: logging.LogRecord) -> str:
        """The record, all of its lines."""
        own = copy.copy(record)
        own.exc_text = None  # else a traceback that another handler has formatted would be taken as it is
        return super().format(own)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The first line."""
        request_id = getattr(record, "request_id", "")
        line = super().formatMessage(record)
        return escape(f"{line} [{request_id}]" if request_id and request_id not in line else line)

    def formatException(self, ei: Any) -> str:
        """The traceback, each line of it indented."""
        return _indent(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:
        """A stack, each line of it indented."""
        return _indent(stack_info)


class JsonFormatter(logging.Formatter):
    """An object a line: RFC 3339 time in UTC, level, logger, message, what is known of the call, and the exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The object."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        line |= {name: value for name in _OF_A_CALL if (value := getattr(record, name, "")) != ""}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str).replace("\x7f", "\\u007f")  # the one control character that JSON lets pass


def escape(text: str) -> str:
    r"""`text` without control characters: a line break becomes "\n", others "\x1b" and the like."""
    return text.translate(_ESCAPES)


def _indent(text: str) -> str:
    """Each line of it, as lines are counted by whoever reads the log, behind four blanks."""
    return "\n".join("    " + escape(line) for line in text.split("\n"))

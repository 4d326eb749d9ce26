"""The log on standard error, as text or JSON. Each record is one line, with the id of its call.

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
"""Seconds over which lines of a kind are counted."""
MOST, MOST_INFO = 20, 200
"""Maximum lines of one kind per interval: of warnings, errors and refused calls, and of others."""
_KINDS = 1000
"""Maximum kinds that are counted separately per interval. All further kinds count as one."""


@dataclass(slots=True)
class _Count:
    last: logging.LogRecord
    passed: int = 0
    held: int = 0


class Repeats:
    """Decides which lines are written. A record's kind is its level, its source line, and its attribute `kind` if it has one;
    records whose `kind` is None are always written. `clock` is in seconds. Used under the handler's lock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._counts: dict[object, _Count] = {}

    def passes(self, record: logging.LogRecord) -> bool:
        """Whether the line is written; if not, it counts for the summary of `due`."""
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
        """Whether there are suppressed lines that `due` has not reported yet."""
        return any(count.held for count in self._counts.values())

    def due(self, now: bool = False) -> list[logging.LogRecord]:
        """A summary of each kind with suppressed lines, if the interval is over or with `now`. A new interval then begins."""
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
"""The logger with one line per call."""

_OURS = ("img2img", "img2img_server")
"""The server's own loggers. Libraries' loggers are too verbose at DEBUG."""
_TEXT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_OF_A_CALL = ("request_id", "client", "method", "model", "status", "reason", "seconds")
"""Fields of a JSON line, in order. Unknown ones are omitted."""
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_ESCAPES |= {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def configure(log_format: str, log_level: str = "info") -> None:
    """Logs to standard error in the format "text" or "json", from `log_level` on ("debug" applies to the server's own packages
    only), including Python's warnings. A repeated call replaces the previous configuration."""
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
    """The handler that `configure` installs. Counts repeated lines and reports them in one line."""

    def __init__(self, formatter: logging.Formatter, repeats: Repeats | None = None) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(formatter)
        self.addFilter(CallFilter())
        self._repeats = repeats or Repeats()
        self._timer: threading.Timer | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Writes due summaries, and the line unless there were too many of its kind."""
        self._write_summaries()
        if self._repeats.passes(record):
            super().emit(record)
        elif self._timer is None:
            self._timer = threading.Timer(INTERVAL, self._interval_ended)
            self._timer.daemon = True
            self._timer.start()

    def close(self) -> None:
        """Writes the remaining summaries."""
        with self.lock or threading.RLock():
            self._write_summaries(now=True)
            if self._timer is not None:
                self._timer.cancel()
        super().close()

    def _write_summaries(self, now: bool = False) -> None:
        for summary in self._repeats.due(now):
            super().emit(summary)

    def _interval_ended(self) -> None:
        with self.lock or threading.RLock():
            self._timer = None
            self._write_summaries(now=True)


class CallFilter(logging.Filter):
    """Adds the id, client and method of the current call to each record that has none.

    On the engine's thread there is no current call, so records there set them by `extra`.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Adds the fields. Always returns True."""
        call = current()
        for name, value in (("request_id", call.request_id), ("client", call.client), ("method", call.method)):
            if value and not hasattr(record, name):
                setattr(record, name, value)
        return True


class TextFormatter(logging.Formatter):
    """Plain text. A line that belongs to a call ends with the request's id.

    Control characters are escaped and tracebacks are indented, so that a message cannot forge a log line.
    """

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def format(self, record: logging.LogRecord) -> str:
        """The record as text, with its traceback."""
        own = copy.copy(record)
        own.exc_text = None  # otherwise a traceback formatted by another handler would be reused
        return super().format(own)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The message's line."""
        request_id = getattr(record, "request_id", "")
        line = super().formatMessage(record)
        return escape(f"{line} [{request_id}]" if request_id and request_id not in line else line)

    def formatException(self, ei: Any) -> str:
        """The traceback with each line indented."""
        return _indent(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:
        """The stack with each line indented."""
        return _indent(stack_info)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: RFC 3339 time in UTC, level, logger, message, fields of the call, and the exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a JSON object."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        line |= {name: value for name in _OF_A_CALL if (value := getattr(record, name, "")) != ""}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str).replace("\x7f", "\\u007f")  # the only control character that JSON does not escape


def escape(text: str) -> str:
    r"""`text` with control characters escaped: a line break becomes "\n", others such as "\x1b"."""
    return text.translate(_ESCAPES)


def _indent(text: str) -> str:
    """Indents each line of `text` by four spaces."""
    return "\n".join("    " + escape(line) for line in text.split("\n"))

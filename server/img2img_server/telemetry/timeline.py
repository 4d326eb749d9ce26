"""A timeline of the device in Chrome's trace format, which https://ui.perfetto.dev and chrome://tracing show."""

import contextlib
import json
import logging
import threading
from pathlib import Path
from typing import Any, TextIO

from img2img_server.engine.interface import Span

_log = logging.getLogger(__name__)

_PROCESS = {"pid": 1, "tid": 1}


class Trace:
    """Writes every stage that the engine runs to a file as it happens: an array of events, whole once `close` was called.

    https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (Trace Event Format); times in microseconds.
    """

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("w", encoding="utf-8")
        self._file.write("[\n")
        self._lock = threading.Lock()
        self._over = False  # closed, or given up

    def observe(self, span: Span) -> None:
        """Notes a stage."""
        arguments = {"model": span.model, "requests": span.requests, "rows": span.rows}
        self._write({"name": span.stage, "ph": "X", "ts": span.start * 1e6, "dur": span.seconds * 1e6, "args": arguments})

    def close(self, **facts: Any) -> None:
        """Ends the file with what is to be said at the end, an event for each. Harmless where that was done before: what comes
        after it, as the engine's last call may, is not noted."""
        for name, arguments in facts.items():
            self._write({"name": name, "ph": "i", "s": "g", "ts": 0, "args": arguments})
        self._put('{"name": "end", "ph": "i", "s": "g", "ts": 0, "pid": 1, "tid": 1}\n]\n', last=True)

    def _write(self, event: dict[str, Any]) -> None:
        self._put(json.dumps({**event, **_PROCESS}) + ",\n")

    def _put(self, text: str, last: bool = False) -> None:
        """A disk that is full ends the timeline, and nothing else: requests do not fail for it."""
        with self._lock:
            if self._over:
                return
            try:
                self._file.write(text)
                if last:
                    self._over = True
                    self._file.close()
            except OSError as error:
                self._over = True
                _log.error("the timeline is incomplete and stops here: %s", error)
                with contextlib.suppress(OSError):  # what could not be written is tried once more
                    self._file.close()

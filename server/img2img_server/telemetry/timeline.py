"""A timeline of the device in Chrome's trace format, for https://ui.perfetto.dev and chrome://tracing."""

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
    """Writes every stage that the engine runs to a file, as a JSON array of events that `close` completes.

    https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (Trace Event Format); times in microseconds.
    """

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("w", encoding="utf-8")
        self._file.write("[\n")
        self._lock = threading.Lock()
        self._over = False  # closed, or failed

    def observe(self, span: Span) -> None:
        """Writes a stage."""
        arguments = {"model": span.model, "requests": span.requests, "rows": span.rows}
        self._write({"name": span.stage, "ph": "X", "ts": span.start * 1e6, "dur": span.seconds * 1e6, "args": arguments})

    def close(self, **facts: Any) -> None:
        """Writes an event for each of `facts` and completes the file. Idempotent. Later events, such as the engine's last call,
        are ignored."""
        for name, arguments in facts.items():
            self._write({"name": name, "ph": "i", "s": "g", "ts": 0, "args": arguments})
        self._put('{"name": "end", "ph": "i", "s": "g", "ts": 0, "pid": 1, "tid": 1}\n]\n', last=True)

    def _write(self, event: dict[str, Any]) -> None:
        self._put(json.dumps({**event, **_PROCESS}) + ",\n")

    def _put(self, text: str, last: bool = False) -> None:
        """Writes text. A full disk ends the timeline but fails no requests."""
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
                with contextlib.suppress(OSError):  # closing retries the write
                    self._file.close()

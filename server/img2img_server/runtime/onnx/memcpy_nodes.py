"""How many copies between CPU and GPU a session makes in each call: ONNX Runtime tells that in its own log only."""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

_WARNING = re.compile(rb"[^\n]*\D(\d+) Memcpy nodes are added to the graph[^\n]*\n?")
_STDERR = 2


@dataclass(slots=True)
class Copies:
    """The Memcpy nodes of the sessions that were opened."""

    count: int = 0


@contextlib.contextmanager
def counting_copies() -> Iterator[Copies]:
    """Counts the Memcpy nodes of sessions that are opened in the block with a log level of warnings (sessions.py).

    ONNX Runtime writes to the process's standard error, and its Python package has no other way to hear of them. What else is
    written there meanwhile comes out after the block.
    """
    found = Copies()
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        kept = os.dup(_STDERR)
        os.dup2(file.fileno(), _STDERR)
        try:
            yield found
        finally:
            os.dup2(kept, _STDERR)
            file.seek(0)
            written = file.read()
            found.count = sum(int(number) for number in _WARNING.findall(written))
            with os.fdopen(kept, "wb") as stderr:
                stderr.write(_WARNING.sub(b"", written))

"""Logs each component's placement: provider, precision, copies per call, and why better providers are not used."""

import contextlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from img2img_server.bundle.manifest import Manifest
from img2img_server.runtime.onnx.providers import ProviderChoice
from img2img_server.runtime.onnx.runners import Make, Runner
from img2img_server.runtime.onnx.sessions import Open, SessionOptions, describe

_WARNING = re.compile(rb"[^\n]*\D(\d+) Memcpy nodes are added to the graph[^\n]*\n?")
_STDERR = 2


@dataclass(slots=True)
class Copies:
    """The Memcpy nodes of the sessions that were opened."""

    count: int = 0


@contextlib.contextmanager
def counting_copies() -> Iterator[Copies]:
    """Counts the Memcpy nodes of sessions that are opened in the block with a log level of warnings (sessions.py).

    A Memcpy node copies between CPU and GPU in each call. ONNX Runtime reports their number only in its log on the process's
    standard error. Other output written there meanwhile appears after the block.
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


_log = logging.getLogger(__name__)


class Placement:
    """Records the sessions opened for one bundle. Runners are made with its `open`; `logged` wraps the function that makes
    them."""

    def __init__(self, bundle: Path, manifest: Manifest, choice: ProviderChoice, open_graph: Open) -> None:
        self._bundle = bundle
        self._precisions = {component.name: component.numbers for component in manifest.components}
        self._why = "".join(f"; not on {probe}" for probe in choice.declined)
        self._open = open_graph
        self._opened: list[tuple[SessionOptions, dict[str, int]]] = []
        self._copies = 0

    def open(self, graph: Path, options: SessionOptions) -> onnxruntime.InferenceSession:
        """Opens the ONNX file, and records its placement."""
        # Only a session that says so in ONNX Runtime's log makes copies (sessions.py).
        if options.provider == "cuda" and not options.recordable:
            with counting_copies() as copies:
                session = self._open(graph, options)
            self._copies = copies.count
        else:
            session = self._open(graph, options)
        self._opened.append((options, describe(session)))
        return session

    def logged(self, make: Make) -> Make:
        """Wraps `make` so that each runner it makes is logged in a line."""

        def make_and_log(name: str, graph: Path) -> Runner:
            self._opened.clear()
            runner = make(name, graph)
            if self._opened:
                _log.info("%s: %s %s%s", self._bundle.name, name, self._sessions(name), self._why)
            return runner

        return make_and_log

    def _sessions(self, name: str) -> str:
        used, _ = self._opened[-1]
        # Sessions of other providers were replaced by the last one.
        opened = [(options, nodes) for options, nodes in self._opened if options.provider == used.provider]
        parts = []
        for options, nodes in opened:
            where = " and ".join(f"{count} nodes on {provider}" for provider, count in nodes.items()) or f"on {options.provider}"
            sizes = ", ".join(f"{axis} {size}" for axis, size in options.dimensions)
            parts.append(f"{where} ({sizes})" if sizes else where)
        recorded = ""
        if used.provider == "cuda":
            recorded = ", recorded as CUDA graphs" if used.recordable else f", not recorded, {self._copies} Memcpy nodes"
        precision = self._precisions.get(name, "fp32")
        return f"runs {' and '.join(parts)} in {precision}, {used.threads} threads{recorded}"

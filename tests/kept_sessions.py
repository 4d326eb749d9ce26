"""Opens each graph of a kept bundle once in a process of the tests: opening took a third of the time of most tests with a model.

A session keeps nothing from one call to the next, and several threads may call it. Its runner, which has state, is created for
each test.
"""

import functools
from pathlib import Path
from unittest.mock import patch

from kept_bundles import KEPT

MOST_SESSIONS = 24
"""A session of a tiny model takes about 10 MB."""


@functools.cache
def keep_sessions() -> None:
    """From now on, pipelines of this process share the sessions of kept bundles, on the CPU provider."""
    from img2img_server.runtime.onnx import placement, sessions

    open_graph = placement.Placement.open

    @functools.lru_cache(MOST_SESSIONS)
    def opened(path: Path, changed: int, options: sessions.SessionOptions) -> object:
        return sessions.open_session(path, options)

    def open_once(self: placement.Placement, graph: Path, options: sessions.SessionOptions) -> object:
        usual = self._open is sessions.open_session and options.provider == "cpu" and not options.weights
        if not usual or not graph.resolve().is_relative_to(KEPT):
            return open_graph(self, graph, options)
        with patch.object(self, "_open", lambda path, how: opened(path.resolve(), path.stat().st_mtime_ns, how)):
            return open_graph(self, graph, options)

    patch.object(placement.Placement, "open", open_once).start()

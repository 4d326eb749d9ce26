"""Fronts on a Ray cluster, which one of them starts, each in its own process. All their processes end with them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_SERVER = _HERE.parent / "benchmarks" / "simulated_server.py"
_STARTING = 800.0
"""Seconds after which a front hangs. One whose Ray does not start ends by itself, after tries that take long on a busy host."""


def environment() -> dict[str, str]:
    """The environment of processes that import the tests' modules, and of their children."""
    paths = os.pathsep.join([str(_HERE), str(_HERE.parent / "benchmarks")])
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}  # else Ray writes one into the home directory
    return {**os.environ, **access, "PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True, slots=True)
class FrontProcess:
    """A front that serves."""

    process: "subprocess.Popen[bytes]"
    port: int
    log: Path

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self) -> int:
        """Drains it. Returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def front(
    ray: Mapping[str, Any],
    device: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    *,
    variables: Mapping[str, str] | None = None,
) -> Iterator[FrontProcess]:
    """A front until the block is left. `ray` are RaySettings', `settings` ServerConfig's, `device` simulated()'s.

    `variables` are added to the environment of the front and of all that it starts.
    """
    with tempfile.TemporaryDirectory() as folder:
        port_file, log = Path(folder) / "port", Path(folder) / "log"
        arguments = [{"engine": "ray", "port_file": str(port_file), **(settings or {})}, dict(ray), dict(device)]
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, str(_SERVER), *map(json.dumps, arguments)],
                stderr=errors,
                env={**environment(), **(variables or {})},
            )
        try:
            begun = time.monotonic()
            while not port_file.exists():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() - begun < _STARTING, log.read_text()
                time.sleep(0.02)
            yield FrontProcess(process, int(port_file.read_text()), log)
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(60)

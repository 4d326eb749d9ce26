"""A server in a process of its own: started, watched from outside, ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 300.0
STAND_IN = (sys.executable, "-m", "soak_parts.stand_in")
SERVE = (sys.executable, "-m", "img2img_cli", "serve")


class ServerFailed(Exception):
    """A server that did not start."""


@dataclass(frozen=True, slots=True)
class Vitals:
    """What the kernel knows of a process: its resident memory in bytes, open file descriptors and threads."""

    rss: int
    descriptors: int
    threads: int


class ServingProcess:
    """One server. Its log and its port file are in `folder`; a log goes on over restarts."""

    def __init__(self, folder: Path, words: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Nothing runs yet. `words` are the command with its flags, but for --port-file."""
        self.log = folder / "server.log"
        self.port = 0
        self._port_file = folder / "port"
        self._words = [*words, "--port-file", str(self._port_file)]
        path = os.pathsep.join(filter(None, (str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH"))))
        self._environment = {**os.environ, "PYTHONPATH": path, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def target(self) -> str:
        """Its address."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._running.pid

    def start(self, port: int = 0, prepare: Callable[[], None] | None = None) -> None:
        """Starts it and returns when it serves. `prepare` is called in the new process. Raises ServerFailed."""
        self._port_file.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._words, "--port", str(port)],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # so that Ctrl-C reaches the driver alone
                preexec_fn=prepare,
            )
        end = time.monotonic() + START_SECONDS
        while not self._port_file.exists():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise ServerFailed(f"the server did not start: {self.read_log()[-3000:]}")
            time.sleep(0.02)
        self.port = int(self._port_file.read_text())

    def vitals(self) -> Vitals:
        """How it is doing."""
        process = psutil.Process(self.pid)
        return Vitals(process.memory_info().rss, process.num_fds(), process.num_threads())

    def terminate(self) -> None:
        """Asks it to drain, and returns at once."""
        self._running.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it on the spot, as kill -9 does, and returns when it is gone. Does nothing to one that has ended."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        if self._process is not None:
            self._process.wait()

    def wait(self, seconds: float) -> int:
        """Its exit status. Raises subprocess.TimeoutExpired where it has not ended by then."""
        return self._running.wait(seconds)

    def read_log(self) -> str:
        """What it wrote so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    @property
    def _running(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None, "start() comes first"
        return self._process


@contextmanager
def serving(
    folder: Path, words: Sequence[str], environment: Mapping[str, str] | None = None, prepare: Callable[[], None] | None = None
) -> Iterator[ServingProcess]:
    """A server that serves within the block and is gone after it."""
    server = ServingProcess(folder, words, environment)
    try:
        server.start(prepare=prepare)
        yield server
    finally:
        server.kill()

"""A server in its own process."""

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
    """The server did not start."""


@dataclass(frozen=True, slots=True)
class Vitals:
    """Resident memory in bytes, open file descriptors and threads of a process."""

    rss: int
    descriptors: int
    threads: int


class ServingProcess:
    """One server. Its log and port file are in `folder`; restarts append to the log."""

    def __init__(self, folder: Path, words: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Does not start it. `words` are the command and its flags except --port-file."""
        self.log = folder / "server.log"
        self.port = 0
        self._port_file = folder / "port"
        self._words = [*words, "--port-file", str(self._port_file)]
        path = os.pathsep.join(filter(None, (str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH"))))
        self._environment = {**os.environ, "PYTHONPATH": path, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def target(self) -> str:
        """The address for clients."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process id."""
        return self._running.pid

    def start(self, port: int = 0, prepare: Callable[[], None] | None = None) -> None:
        """Starts it and returns once it serves. `prepare` is called in the new process. Raises ServerFailed."""
        self._port_file.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._words, "--port", str(port)],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # so that Ctrl-C reaches only the driver
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
        """The current state of the process."""
        process = psutil.Process(self.pid)
        return Vitals(process.memory_info().rss, process.num_fds(), process.num_threads())

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self._running.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL and waits for the end. Does nothing if it has ended."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        if self._process is not None:
            self._process.wait()

    def wait(self, seconds: float) -> int:
        """Waits for the exit status. Raises subprocess.TimeoutExpired if it has not ended by then."""
        return self._running.wait(seconds)

    def read_log(self) -> str:
        """The log so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    @property
    def _running(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None, "start() comes first"
        return self._process


@contextmanager
def serving(
    folder: Path, words: Sequence[str], environment: Mapping[str, str] | None = None, prepare: Callable[[], None] | None = None
) -> Iterator[ServingProcess]:
    """A server that runs within the block."""
    server = ServingProcess(folder, words, environment)
    try:
        server.start(prepare=prepare)
        yield server
    finally:
        server.kill()

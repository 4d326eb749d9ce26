"""A server in a process of its own: its log, its port and its end."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from conftest import REPOSITORY

FAULTY = (str(REPOSITORY / "tests" / "faulty_server.py"),)


class Process:
    """A server's process, with its log and its port."""

    def __init__(self, folder: Path, *words: str) -> None:
        self._log, self.port_file = folder / "log", folder / "port"
        command = [sys.executable, *words, "--port", "0", "--port-file", str(self.port_file), "--warm-up", "0"]
        with self._log.open("wb") as log:
            self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    @contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        """A channel to the server, once that serves."""
        while not self.port_file.exists():
            assert self.popen.poll() is None, self.log
            time.sleep(0.05)
        with grpc.insecure_channel(f"localhost:{self.port_file.read_text(encoding='ascii').strip()}") as channel:
            yield channel

    @property
    def port(self) -> int:
        """The port that the server has written to its port file."""
        return int(self.port_file.read_text(encoding="ascii"))

    def next_output(self) -> str:
        """The next line of its standard output."""
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

"""A codec process: `python -m img2img_server.codecs.worker DESCRIPTOR PARENT`, started and killed by pool.py.

It reads pickled jobs from a socket, each with a file of its bytes. The kernel enforces the memory and processor time that the job
has requested: without memory decoders fail; after the time SIGPROF kills the process.
"""

import importlib
import mmap
import os
import pickle
import resource
import signal
import socket
import sys
import warnings
from typing import Any

from img2img_server.codecs.jobs import MOST, Ask, Begin, JobDone, JobFailed, Ready, file_of, send
from img2img_server.errors import ImageMemoryFull, InvalidField, ServerError
from img2img_server.support.child_process import end_with

_SECONDS = 2.0
"""Processor time for a small image."""
MOST_TEXT = 2000
"""Maximum characters of an unexpected error."""
_BYTES = 32 * 2**20
"""Memory in addition to requests, for a decoder's tables and Python's own objects."""


def main(descriptor: int, parent: int) -> None:
    """Runs jobs until the socket is closed, or the parent process ends."""
    # These signals reach the whole group or container. The parent drains and then closes the socket.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # The parent's end does not close the socket if another process has a copy of it.
    if not end_with(parent):
        return
    warnings.simplefilter("ignore")
    connection = socket.socket(fileno=descriptor)
    send(connection, Ready())
    # Loading them takes more memory than a job for a small image may use. The parent does not wait for it.
    for name in ("numpy", "isal.isal_zlib"):
        importlib.import_module(name)
    # From here on C libraries may write text that clients control.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    while True:
        message, files, _, _ = socket.recv_fds(connection, MOST, 1)
        if not message:
            return
        _answer(connection, pickle.loads(message), files)  # noqa: S301 - from the parent


def _answer(connection: socket.socket, begin: Begin, files: list[int]) -> None:
    with os.fdopen(files[0], "rb") as file:
        data = file.read()
    allowance, job = _Allowance(connection, begin.size, begin.seconds), begin.job
    try:
        value, content = job.run(data, allowance.reserve)
        allowance.end()
        answer = file_of(content) if content else None
    except ServerError as error:
        send(connection, JobFailed(error))
    except MemoryError:
        send(connection, JobFailed(_no_memory(job)))
    except Exception as error:  # noqa: BLE001 - codecs raise anything; the parent logs it
        send(connection, JobFailed(RuntimeError(f"{type(error).__name__}: {error}"[:MOST_TEXT])))
    else:
        send(connection, JobDone(value), *(() if answer is None else (answer,)))
        if answer is not None:
            os.close(answer)
    finally:
        allowance.end()


def _no_memory(job: Any) -> Exception:
    """The error of a job that exceeds the memory for an image of its size."""
    field = getattr(job, "field", None)
    return MemoryError() if field is None else InvalidField(field, "decoding the image takes more memory than its size allows")


class _Allowance:
    """The memory and processor time that one job may use."""

    def __init__(self, connection: socket.socket, size: int, seconds: float) -> None:
        self._connection = connection
        self._held = _held_bytes()
        self._bytes, self._seconds = _BYTES + size, _SECONDS + seconds
        self._apply()

    def reserve(self, size: int, seconds: float) -> None:
        """Requests more memory from the parent, and adds it and the time. Raises ImageMemoryFull."""
        send(self._connection, Ask(size))
        refused: ImageMemoryFull | None = pickle.loads(self._connection.recv(MOST))  # noqa: S301 - from the parent
        if refused is not None:
            raise refused
        self._bytes += size
        self._seconds += seconds
        self._apply()

    def end(self) -> None:
        """Removes the limits after the job."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        _limit_memory(None)

    def _apply(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, self._seconds)
        _limit_memory(self._held + self._bytes)


def _held_bytes() -> int:
    """The bytes of this process's data segment."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - faster, since this runs for each image
            return int(file.read().split()[5]) * mmap.PAGESIZE
    except OSError:
        return 0


def _limit_memory(size: int | None) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = hard if size is None else size if hard == resource.RLIM_INFINITY else min(size, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

"""A process that runs codecs: `python -m img2img_server.codecs.worker DESCRIPTOR PARENT`, started and ended by process.py.

It reads pickled jobs from a socket, and each one's bytes from a file that comes along. The kernel holds it to the memory and the
processor time that it asked for: beyond the memory, decoders fail; beyond the time, SIGPROF ends the process.
"""

import mmap
import os
import pickle
import resource
import signal
import socket
import sys
import warnings
from typing import Any

from img2img_server.codecs.jobs import MOST, Ask, Job, JobDone, JobFailed, Ready, file_of, send
from img2img_server.errors import ImageMemoryFull, InvalidField, ServerError
from img2img_server.support.child_process import end_with

_SECONDS = 2.0
"""Of processor time, for a small image."""
MOST_TEXT = 2000
"""Characters of an unexpected error."""
_BYTES = 32 * 2**20
"""Of memory, beyond what is asked for: a decoder's tables and Python's own objects."""


def main(descriptor: int, parent: int) -> None:
    """Runs jobs until the socket is closed, or the parent process ends."""
    # These come to the whole group or container: the parent drains, and closes the socket when it is done.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # The parent's end closes the socket only if no other process has a copy of it.
    if not end_with(parent):
        return
    warnings.simplefilter("ignore")
    connection = socket.socket(fileno=descriptor)
    send(connection, Ready())
    # From here on C libraries may write what strangers make them write.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    while True:
        message, files, _, _ = socket.recv_fds(connection, MOST, 1)
        if not message:
            return
        _answer(connection, pickle.loads(message), files)  # noqa: S301 - of the parent


def _answer(connection: socket.socket, job: Job, files: list[int]) -> None:
    with os.fdopen(files[0], "rb") as file:
        data = file.read()
    allowance = _Allowance(connection)
    try:
        value, content = job.run(data, allowance.reserve)
        allowance.end()
        answer = file_of(content) if content else None
    except ServerError as error:
        send(connection, JobFailed(error))
    except MemoryError:
        send(connection, JobFailed(_no_memory(job)))
    except Exception as error:  # noqa: BLE001 - the process's edge: what a codec raises is the parent's to log
        send(connection, JobFailed(RuntimeError(f"{type(error).__name__}: {error}"[:MOST_TEXT])))
    else:
        send(connection, JobDone(value), *(() if answer is None else (answer,)))
        if answer is not None:
            os.close(answer)
    finally:
        allowance.end()


def _no_memory(job: Any) -> Exception:
    """The error of a job that took more memory than an image of its size should."""
    field = getattr(job, "field", None)
    return MemoryError() if field is None else InvalidField(field, "decoding the image takes more memory than its size allows")


class _Allowance:
    """The memory and processor time of one job."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._held = _held_bytes()
        self._bytes, self._seconds = _BYTES, _SECONDS
        self._apply()

    def reserve(self, size: int, seconds: float) -> None:
        """Asks the parent for more memory, and adds it and the time."""
        send(self._connection, Ask(size))
        refused: ImageMemoryFull | None = pickle.loads(self._connection.recv(MOST))  # noqa: S301 - of the parent
        if refused is not None:
            raise refused
        self._bytes += size
        self._seconds += seconds
        self._apply()

    def end(self) -> None:
        """The job is done."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        _bound_memory(None)

    def _apply(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, self._seconds)
        _bound_memory(self._held + self._bytes)


def _held_bytes() -> int:
    """Bytes of data that this process has now."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - read for each image
            return int(file.read().split()[5]) * mmap.PAGESIZE
    except OSError:
        return 0


def _bound_memory(size: int | None) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = hard if size is None else size if hard == resource.RLIM_INFINITY else min(size, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

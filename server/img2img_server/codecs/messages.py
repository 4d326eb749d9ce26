"""What passes between the server and a codec process: small pickled messages, and bytes in files without a name."""

import os
import pickle
import socket
import tempfile
from dataclasses import dataclass
from typing import IO

from img2img_server.errors import StorageFailed

MOST = 64 * 2**10
"""Bytes of a message. Images are in files."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The process takes jobs."""


@dataclass(frozen=True, slots=True)
class Ask:
    """The job needs so many more bytes of memory. The answer is None, or the error that refuses them."""

    size: int


@dataclass(frozen=True, slots=True)
class JobDone:
    """The job's result, beside the bytes in a file that comes along if there are any."""

    value: object


@dataclass(frozen=True, slots=True)
class JobFailed:
    """The job's error."""

    error: Exception


Told = Ready | Ask | JobDone | JobFailed


def send(connection: socket.socket, message: object, *files: int) -> None:
    """Sends a message, with descriptors of files."""
    socket.send_fds(connection, [pickle.dumps(message)], files)


def file_of(data: bytes) -> int:
    """A descriptor, which the caller closes, of a file in memory that holds `data` and is read from its start.

    Raises StorageFailed if the system gives no such file or no room in it.
    """
    try:
        with _memory_file() as file:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
            file.seek(0)
            return os.dup(file.fileno())
    except OSError as error:
        raise StorageFailed(f"the server has no room for the bytes of an image: {error.strerror}") from error


def _memory_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("img2img-codec", os.MFD_CLOEXEC), "wb", buffering=0)
    return tempfile.TemporaryFile(buffering=0)

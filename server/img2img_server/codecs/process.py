"""A codec process: takes jobs over a socket, with files for their images, and can be killed at any time."""

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

from img2img_server.codecs.jobs import (
    MOST,
    Ask,
    Begin,
    Job,
    JobDone,
    JobFailed,
    Ready,
    WorkerMessage,
    send,
)

COMMAND = (sys.executable, "-P", "-m", "img2img_server.codecs.worker")
_KEPT_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**24), "MALLOC_MMAP_THRESHOLD_": str(2**23)}
"""Settings of glibc: freed memory, up to 16 MiB in blocks below 8 MiB, stays with the process for its next image. Otherwise each
image of 512 x 512 pixels has 500 to 850 page faults, which take 2 ms."""


def environment() -> dict[str, str]:
    """The environment variables of a codec process."""
    return {**_KEPT_MEMORY, **os.environ}


class ProcessDied(Exception):
    """The process ended during a job. `signal` is the number of the signal that killed it, 0 if it exited."""

    def __init__(self, number: int) -> None:
        super().__init__(f"a codec process ended, signal {number}")
        self.signal = number


class CodecProcess:
    """A codec process. After `start` it runs one job at a time; after ProcessDied it cannot be used again."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._connection: socket.socket | None = None
        self._killed = False
        self._ready = False

    @property
    def alive(self) -> bool:
        """Whether it accepts jobs."""
        return self._ready and not self._killed and self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Starts it and waits until it accepts jobs, about 0.2 s. Raises ProcessDied or OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._connection = ours
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *COMMAND,
                str(theirs.fileno()),
                str(os.getpid()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment(),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        message, _ = await self._receive()
        assert isinstance(message, Ready), "the first message is Ready"
        self._ready = True

    async def run(self, job: Job, data: int, allow: Callable[[int], Exception | None]) -> tuple[object, int | None]:
        """Runs a job on the file `data`. Returns its result, and the descriptor of the result's file, if any.

        `allow` decides on requests for more memory, in bytes: it returns the error that refuses one, None to grant it. Raises the
        job's errors, or ProcessDied.
        """
        # The resources that every job needs are granted with it: each question costs two switches between processes.
        size, seconds = job.advance(os.fstat(data).st_size)
        if (refused := allow(size)) is not None:
            raise refused
        await self._send(Begin(job, size, seconds), data)
        while True:
            message, file = await self._receive()
            if isinstance(message, Ask):
                await self._send(allow(message.size))
            elif isinstance(message, JobFailed):
                raise message.error
            else:
                assert isinstance(message, JobDone), "Ready is sent once"
                return message.value, file

    def kill(self) -> None:
        """Kills it without waiting for its end."""
        self._killed = True
        if self._process is not None and self._process.returncode is None:
            # Not by Process.kill, which would consume the exit status that asyncio needs if the process has just ended.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def close(self) -> None:
        """Kills it and waits for its end."""
        self.kill()
        if self._process is not None:
            await self._process.wait()
        if self._connection is not None:
            self._connection.close()

    async def _send(self, message: object, *files: int) -> None:
        assert self._connection is not None, "start was called"
        try:
            send(self._connection, message, *files)
        except OSError:  # the process has ended; messages are too few and small to fill the socket
            await self._died()

    async def _receive(self) -> tuple[WorkerMessage, int | None]:
        assert self._connection is not None, "start was called"
        while True:
            try:
                message, files, _, _ = socket.recv_fds(self._connection, MOST, 1)
            except BlockingIOError:
                await _readable(self._connection)
            except ConnectionError:
                await self._died()
            else:
                if not message:
                    await self._died()
                return pickle.loads(message), files[0] if files else None  # noqa: S301 - from our own process

    async def _died(self) -> None:
        """Waits for the exit status and raises ProcessDied. Only its end closes the process's side of the connection."""
        self._killed = True
        assert self._process is not None, "start was called"
        status = await self._process.wait()
        raise ProcessDied(max(0, -status))


async def _readable(connection: socket.socket) -> None:
    """Waits until there is something to read or the other side has closed."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    file = connection.fileno()  # asyncio writes the representation of a socket each time, which takes longer than all else here
    loop.add_reader(file, wake)
    try:
        await ready
    finally:
        loop.remove_reader(file)

"""The server's side of a codec process: starts it, gives it one job at a time, and can end it at any moment."""

import asyncio
import contextlib
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

from img2img_server.codecs.jobs import MOST, Ask, Job, JobDone, JobFailed, Ready, Told, send

_log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-P", "-m", "img2img_server.codecs.worker")


class ProcessDied(Exception):
    """The process ended in the middle of a job. `signal` ended it, 0 if it ended by itself."""

    def __init__(self, number: int) -> None:
        super().__init__(f"a codec process ended, signal {number}")
        self.signal = number


class CodecProcess:
    """One process. `start` it, then `run` one job after the other; after ProcessDied it is of no more use."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._connection: socket.socket | None = None
        self._killed = False
        self._ready = False

    @property
    def alive(self) -> bool:
        """Whether it takes jobs."""
        return self._ready and not self._killed and self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Starts it and waits until it takes jobs, some 0.2 s. Raises ProcessDied or OSError."""
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
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        told, _ = await self._receive()
        assert isinstance(told, Ready), "it is the first message"
        self._ready = True

    async def run(self, job: Job, data: int, allow: Callable[[int], Exception | None]) -> tuple[object, int | None]:
        """Runs a job on the bytes of the file `data`. Returns its result, and the descriptor of the file with its bytes, if any.

        `allow` says of so many more bytes of memory why they cannot be had, None if they can. Raises what the job raises, or
        ProcessDied.
        """
        await self._send(job, data)
        while True:
            told, file = await self._receive()
            if isinstance(told, Ask):
                await self._send(allow(told.size))
            elif isinstance(told, JobFailed):
                raise told.error
            else:
                assert isinstance(told, JobDone), "a job ends in one of these"
                return told.value, file

    def kill(self) -> None:
        """Ends it at once, whatever it does. Waits for nothing."""
        self._killed = True
        if self._process is not None and self._process.returncode is None:
            # Not by its own method, which would take the exit status away from asyncio if the process has just ended.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def close(self) -> None:
        """Ends it, and waits until it is gone."""
        self.kill()
        if self._process is not None:
            await self._process.wait()
        if self._connection is not None:
            self._connection.close()

    async def _send(self, message: object, *files: int) -> None:
        assert self._connection is not None, "it was started"
        try:
            send(self._connection, message, *files)
        except OSError:  # it is gone; messages are too few and small to fill the socket
            await self._died()

    async def _receive(self) -> tuple[Told, int | None]:
        assert self._connection is not None, "it was started"
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
                return pickle.loads(message), files[0] if files else None  # noqa: S301 - of our own process

    async def _died(self) -> None:
        """Raises ProcessDied, once it is known how it ended. It closes its side of the connection by ending only."""
        self._killed = True
        assert self._process is not None, "it was started"
        status = await self._process.wait()
        raise ProcessDied(max(0, -status))


async def _readable(connection: socket.socket) -> None:
    """Returns when there is something to read, or the other side is gone."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection, wake)
    try:
        await ready
    finally:
        loop.remove_reader(connection)

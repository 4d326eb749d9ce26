"""Codec processes that servers in this process use one after the other: starting two takes longer than most tests do."""

import asyncio
import atexit
import os
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from img2img_server.codecs.process import COMMAND, CodecProcess, ProcessDied, environment

_spawner = ThreadPoolExecutor(1, "test-codecs")
"""A thread that lasts: the kernel ends a codec process with the thread that started it."""
_idle: list["_Running"] = []


class _Running:
    """A started process, as CodecProcess sees one, and the socket to it. It belongs to no event loop."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._popen = subprocess.Popen(
                [*COMMAND, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment(),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        ours.setblocking(False)
        self.connection = ours
        self.pid = self._popen.pid

    @property
    def returncode(self) -> int | None:
        return self._popen.poll()

    async def wait(self) -> int:
        return await asyncio.to_thread(self._popen.wait)

    def end(self) -> None:
        self._popen.kill()
        self._popen.wait()
        self.connection.close()


class KeptProcess(CodecProcess):
    """Goes on when its server ends it, unless it has a job: the next server has it then."""

    def __init__(self) -> None:
        super().__init__()
        self._busy = self._lost = False

    async def start(self) -> None:
        while _idle:
            found = _idle.pop()
            if found.returncode is None:
                self._use(found)
                self._ready = True
                return
            found.end()
        self._use(await asyncio.wrap_future(_spawner.submit(_Running)))
        await self._receive()
        self._ready = True

    def _use(self, running: _Running) -> None:
        self._process, self._connection = running, running.connection  # type: ignore[assignment]

    async def run(self, *arguments: Any) -> tuple[object, int | None]:
        if self._connection is None:
            raise ProcessDied(0)
        self._busy = True
        try:
            return await super().run(*arguments)
        except (asyncio.CancelledError, ProcessDied):
            self._lost = True  # its answer may come yet
            raise
        finally:
            self._busy = False

    def kill(self) -> None:
        running: Any = self._process
        if self.alive and not self._busy and not self._lost:
            self._killed, self._process, self._connection = True, None, None
            _idle.append(running)
        else:
            super().kill()


@atexit.register
def end_all() -> None:
    """Ends the processes that no server has."""
    while _idle:
        _idle.pop().end()

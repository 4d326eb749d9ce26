"""A codec process that is none: it runs its jobs on a thread of this process, once it is allowed to."""

import asyncio
import os
from collections.abc import Callable

from img2img_server.codecs.jobs import Job, file_of
from img2img_server.codecs.process import CodecProcess


def _at_once(job: Job) -> None:
    """Waits for nothing."""


class FakeProcess(CodecProcess):
    """Calls `before` with each job, on the job's own thread; that may wait."""

    def __init__(self, before: Callable[[Job], object] = _at_once) -> None:
        super().__init__()
        self._before = before
        self._ended = False

    @property
    def alive(self) -> bool:
        return not self._ended

    async def start(self) -> None:
        """Starts nothing."""

    async def run(self, job: Job, data: int, allow: Callable[[int], Exception | None]) -> tuple[object, int | None]:
        with os.fdopen(os.dup(data), "rb") as file:
            content = file.read()
        loop = asyncio.get_running_loop()

        def reserve(size: int, seconds: float) -> None:
            async def ask() -> Exception | None:
                return allow(size)

            refused = asyncio.run_coroutine_threadsafe(ask(), loop).result(60)
            if refused is not None:
                raise refused

        if (refused := allow(job.advance(len(content))[0])) is not None:
            raise refused

        def run() -> tuple[object, bytes]:
            self._before(job)
            return job.run(content, reserve)

        value, answer = await asyncio.to_thread(run)
        return value, file_of(answer) if answer else None

    def kill(self) -> None:
        self._ended = True

    async def close(self) -> None:
        self.kill()

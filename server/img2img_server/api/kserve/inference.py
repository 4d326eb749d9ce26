"""Runs one KServe inference: translates it, runs it by ImageToImageService, and translates the result back."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from img2img.v1 import image_to_image_pb2 as pb

from img2img_server.api.kserve import translation
from img2img_server.api.kserve.translation import Task
from img2img_server.api.transform import ImageToImageService
from img2img_server.codecs.pool import ImageMemory
from img2img_server.engine.interface import EngineInterface
from img2img_server.errors import DeadlineExpired
from img2img_server.support.call import current
from img2img_server.support.fair_queue import FairThreads

_THREADS = 2
"""Threads that read tensors, shared fairly among clients."""


class Until:
    """A call context for a service, with the earlier of the call's deadline and the request's own timeout.

    `ends` is a time of time.monotonic in seconds, None if the request has no timeout.
    """

    def __init__(self, context: Any, ends: float | None) -> None:
        self._context = context
        self._ends = ends

    def time_remaining(self) -> float | None:
        """Seconds until the deadline, None without one."""
        left: float | None = self._context.time_remaining()
        if self._ends is None:
            return left
        own = self._ends - time.monotonic()
        return own if left is None else min(left, own)


class Inference:
    """Runs ModelInferRequests by `transforms` if `runner` admits them. `memory` accounts for requests in streams. Errors name
    KServe's tensors."""

    def __init__(self, transforms: ImageToImageService, runner: EngineInterface, memory: ImageMemory) -> None:
        self._memory = memory
        self._transforms = transforms
        self._runner = runner
        self._threads = FairThreads(_THREADS, "img2img-tensors")

    async def once(self, request: Any, context: Any) -> Any:
        """Returns the ModelInferResponse of a request."""
        return await self._finished(await self._read(request), context)

    async def stream(self, request: Any, context: Any) -> AsyncGenerator[tuple[Any, bool], None]:
        """Yields the ModelInferResponses of a request, each with whether it is the final one. If progress is requested, there is
        one response per step before it."""
        with self._memory.hold(current(), request.ByteSize()):
            task = await self._read(request)
            if not task.progress:
                yield await self._finished(task, context), True
                return
            message = pb.TransformStreamRequest(request=task.message)
            async with (
                self._running(task, context) as until,
                aclosing(self._transforms.TransformStream(message, until)) as events,
            ):
                async for event in events:
                    if event.HasField("progress"):
                        yield translation.written_progress(task, event.progress), False
                    elif event.HasField("completed"):
                        yield translation.written(task, event.completed), True

    async def _read(self, request: Any) -> Task:
        """Reads a request while holding an admission slot, so that a full server refuses it before it is read."""
        with self._runner.reserve(current().client):
            return await translation.read(request, self._threads)

    async def _finished(self, task: Task, context: Any) -> Any:
        async with self._running(task, context) as until:
            return translation.written(task, await self._transforms.Transform(task.message, until))

    @asynccontextmanager
    async def _running(self, task: Task, context: Any) -> AsyncIterator[Until]:
        """Applies the task's timeout to the block, and renames fields in its errors to KServe's."""
        with translation.renamed(task.source):
            ends = None if task.seconds is None else time.monotonic() + task.seconds
            timeout = asyncio.timeout(task.seconds)
            try:
                async with timeout:
                    yield Until(context, ends)
            except TimeoutError:
                if not timeout.expired():
                    raise
                raise DeadlineExpired(f"the request did not finish within its timeout of {task.seconds:g} s") from None

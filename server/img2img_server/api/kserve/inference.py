"""KServe inferences, single (ModelInfer) and in streams (ModelStreamInfer): translates requests, runs them by
ImageToImageService, and translates the results back. Each request of a stream is admitted, observed and refused separately;
responses interleave.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from img2img.v1 import image_to_image_pb2 as pb
from tritonclient.grpc import service_pb2 as kserve_pb  # type: ignore[import-untyped]

from img2img_server.access.access import Access
from img2img_server.api.interceptors import to_status
from img2img_server.api.kserve import translation
from img2img_server.api.kserve.translation import Task
from img2img_server.api.request_stream import RequestStream
from img2img_server.api.transform import ImageToImageService
from img2img_server.codecs.pool import ImageMemory
from img2img_server.engine.interface import EngineInterface
from img2img_server.errors import DeadlineExpired, ServerError
from img2img_server.support.call import current
from img2img_server.support.cancellation import time_limit
from img2img_server.support.fair_queue import FairThreads
from img2img_server.telemetry.telemetry import Telemetry

_THREADS = 2
"""Threads that read tensors, shared fairly among clients."""
_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_MOST_IN_PROGRESS = 64
_FINAL = "triton_final_response"


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
        with translation.renamed(task.sources):
            ends = None if task.seconds is None else time.monotonic() + task.seconds
            async with time_limit(
                task.seconds,
                lambda: DeadlineExpired(f"the request did not finish within its timeout of {task.seconds or 0:g} s"),
            ):
                yield Until(context, ends)


def request_stream(inference: Inference, access: Access, telemetry: Telemetry, context: Any) -> RequestStream:
    """One call of ModelStreamInfer."""

    async def respond(request: Any, number: int) -> AsyncGenerator[tuple[Any, bool], None]:
        async with aclosing(inference.stream(request, context)) as responses:
            async for response, final in responses:
                response.parameters[_FINAL].bool_param = final
                yield kserve_pb.ModelStreamInferResponse(infer_response=response), final

    return RequestStream(_METHOD, respond, _failed, access, telemetry, context, in_progress=_MOST_IN_PROGRESS)


def _failed(request: Any, number: int, error: ServerError, request_id: str) -> Any:
    """The response of an error. Triton's client only shows the text, so it includes the request's id and the status."""
    status = to_status(error, request_id)
    response = kserve_pb.ModelInferResponse(model_name=request.model_name, id=request.id)
    response.parameters["status"].string_param = error.status
    response.parameters["reason"].string_param = error.reason
    response.parameters[_FINAL].bool_param = True
    text = f"[request id: {request.id or '<id_unknown>'}] {error.status}: {status.message}"
    return kserve_pb.ModelStreamInferResponse(error_message=text, infer_response=response)

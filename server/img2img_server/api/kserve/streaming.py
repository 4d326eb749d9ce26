"""ModelStreamInfer: many inferences in one call, their answers interleaved, each admitted, observed and refused by itself."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from tritonclient.grpc import service_pb2 as kserve_pb  # type: ignore[import-untyped]

from img2img_server.access.access import Access
from img2img_server.api.interceptors import call_of, given_up, let_go, to_status
from img2img_server.api.kserve.inference import Inference
from img2img_server.errors import ServerError
from img2img_server.support.call import Call, answering, current
from img2img_server.telemetry.telemetry import Outcome, Telemetry

_log = logging.getLogger(__name__)

_METHOD = "/inference.GRPCInferenceService/ModelInfer"
"""What a request of a stream is to tokens, logs and metrics: the same as one that comes by itself."""
_MOST_IN_FLIGHT = 64
"""Requests of one stream that are in progress. What comes beyond is read when one of them is answered: gRPC holds it back."""
_FINAL = "triton_final_response"

_Answer = tuple[Any, bool]
"""A ModelStreamInferResponse, and whether it is its request's last."""


class Stream:
    """One call of ModelStreamInfer."""

    def __init__(self, inference: Inference, access: Access, telemetry: Telemetry, context: Any) -> None:
        self._inference = inference
        self._access = access
        self._telemetry = telemetry
        self._context = context
        self._answers: asyncio.Queue[_Answer | asyncio.Task[None]] = asyncio.Queue()
        self._room = asyncio.Semaphore(_MOST_IN_FLIGHT)
        self._tasks: set[asyncio.Task[None]] = set()

    async def responses(self, requests: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
        """The answers to the requests as they come. Leaving early cancels what still runs.

        Raises what reading the requests does; what is wrong with one of them is told in its answer.
        """
        reader = asyncio.create_task(self._read(requests))
        reader.add_done_callback(self._answers.put_nowait)
        try:
            while not isinstance(answer := await self._answers.get(), asyncio.Task):
                response, last = answer
                yield response
                if last:
                    self._room.release()
            await answer
        finally:
            in_flight = (reader, *self._tasks)
            for task in in_flight:
                task.cancel()
            await asyncio.gather(*in_flight, return_exceptions=True)
            # The reader is among them, and knows this stream: what nobody reads would live until Python looks for cycles.
            self._answers = asyncio.Queue()

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        """Begins each request when it comes. Ends when all are answered."""
        count = 0
        async for request in requests:
            await self._room.acquire()
            count += 1
            task = asyncio.create_task(self._answer(request, count))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await asyncio.gather(*self._tasks)

    async def _answer(self, request: Any, number: int) -> None:
        """Answers one request, as CallInterceptor does a call."""
        metadata = self._context.invocation_metadata() or ()
        call = call_of(_METHOD, metadata, self._context.peer())
        call = replace(call, request_id=f"{current().request_id}-{number}")
        with self._telemetry.call(call) as outcome:
            try:
                with self._access.admitted(call, metadata) as admitted, answering(admitted):
                    outcome.client = admitted.client
                    await self._infer(request)
            except asyncio.CancelledError:
                outcome.status = given_up(self._context.time_remaining())
                raise
            except Exception as caught:  # noqa: BLE001 - the service's edge
                self._answers.put_nowait((_refused(request, caught, call, outcome), True))

    async def _infer(self, request: Any) -> None:
        async with aclosing(self._inference.told(request, self._context)) as responses:
            async for response, final in responses:
                response.parameters[_FINAL].bool_param = final
                self._answers.put_nowait((kserve_pb.ModelStreamInferResponse(infer_response=response), final))


def _refused(request: Any, error: Exception, call: Call, outcome: Outcome) -> Any:
    """An error's answer, which is also the call's outcome. Nothing of the request is held by the error afterwards."""
    if not isinstance(error, ServerError):
        _log.error("%s failed", call.method, exc_info=error, extra={"request_id": call.request_id})
    let_go(error)
    told = error if isinstance(error, ServerError) else ServerError("internal server error")
    outcome.status, outcome.reason = told.status, told.reason
    return _failed(request, told, call.request_id)


def _failed(request: Any, error: ServerError, request_id: str) -> Any:
    """An error's answer. Triton's client gives its text and nothing else, so that has the request's id and the status, too."""
    status = to_status(error, request_id)
    response = kserve_pb.ModelInferResponse(model_name=request.model_name, id=request.id)
    response.parameters["status"].string_param = error.status
    response.parameters["reason"].string_param = error.reason
    response.parameters[_FINAL].bool_param = True
    told = f"[request id: {request.id or '<id_unknown>'}] {error.status}: {status.message}"
    return kserve_pb.ModelStreamInferResponse(error_message=told, infer_response=response)

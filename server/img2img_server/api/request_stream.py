"""Many requests in one call with interleaved responses. Each request is admitted, observed and refused separately."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from img2img_server.access.access import Access
from img2img_server.api.interceptors import call_of, cancelled_status, failed
from img2img_server.codecs.pool import ImageMemory
from img2img_server.errors import DeadlineExpired, Exhausted, ImageMemoryFull, ServerError
from img2img_server.support.call import answering, current
from img2img_server.telemetry.telemetry import Telemetry

IDLE_SECONDS = 60.0
"""How long a patient call may wait for its next request while it has none in progress."""
_FIRST_RETRY, _LAST_RETRY = 0.25, 8.0
"""Minimum seconds between two attempts of a request, at first and at most: they double, so waiting requests cost little."""

Respond = Callable[[Any, int], AsyncGenerator[tuple[Any, bool], None]]
"""Runs a request, the number of which in the stream is from 0. Yields its responses, and whether each is the final one."""
Refuse = Callable[[Any, int, ServerError, str], Any]
"""The response of a request that failed. Arguments: the request, its number, the error, and its request id."""


class RequestStream:
    """One call that carries many requests.

    `method` is what access, logs and metrics see for each request: the method of a single one. At most `in_progress` requests
    are in progress; further ones are not read before one is answered (gRPC's flow control). With `memory` the call is patient: a
    request that is refused for now (QUEUE_FULL, RATE_LIMITED ...) is tried again until the call ends, while `memory` accounts for
    its message; and the requests before a message that cannot be read are finished, instead of cancelled.
    """

    def __init__(
        self,
        method: str,
        respond: Respond,
        refuse: Refuse,
        access: Access,
        telemetry: Telemetry,
        context: Any,
        *,
        in_progress: int,
        memory: ImageMemory | None = None,
    ) -> None:
        self._method = method
        self._respond = respond
        self._refuse = refuse
        self._access = access
        self._telemetry = telemetry
        self._context = context
        self._memory = memory
        self._call = current()
        self._answers: asyncio.Queue[tuple[Any, bool] | asyncio.Task[None]] = asyncio.Queue()
        self._in_progress = asyncio.Semaphore(in_progress)
        self._tasks: set[asyncio.Task[None]] = set()

    async def responses(self, requests: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
        """Yields responses as requests finish. Closing the generator cancels running requests.

        Raises the errors of reading the stream. The error of a single request is its response.
        """
        reader = asyncio.create_task(self._read(requests))
        reader.add_done_callback(self._answers.put_nowait)
        try:
            while not isinstance(answer := await self._answers.get(), asyncio.Task):
                response, last = answer
                yield response
                if last:
                    self._in_progress.release()
            await answer
        finally:
            in_progress = (reader, *self._tasks)
            for task in in_progress:
                task.cancel()
            await asyncio.gather(*in_progress, return_exceptions=True)
            # The queue contains the reader, which refers to this stream: this breaks the reference cycle.
            self._answers = asyncio.Queue()

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        """Starts each request when it arrives. Returns when all are answered."""
        count = 0
        try:
            await self._in_progress.acquire()
            async for request in self._arriving(requests):
                task = asyncio.create_task(self._run(request, count))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                count += 1
                await self._in_progress.acquire()
        except ServerError:
            if self._memory is not None:
                await asyncio.gather(*self._tasks)
            raise
        await asyncio.gather(*self._tasks)

    async def _arriving(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Yields requests. A patient call raises DeadlineExpired if none arrives for IDLE_SECONDS while none is in progress."""
        iterator, ended = aiter(requests), object()
        while True:
            arriving = asyncio.ensure_future(anext(iterator, ended))
            try:
                while not (await asyncio.wait((arriving,), timeout=IDLE_SECONDS))[0]:
                    if self._memory is not None and not self._tasks:
                        raise DeadlineExpired(f"no request arrived for {IDLE_SECONDS:g} s")
                if (request := arriving.result()) is ended:
                    return
            finally:
                arriving.cancel()
            yield request

    async def _run(self, request: Any, number: int) -> None:
        if self._memory is None:
            await self._attempt(request, number, final=True)
            return
        try:
            with self._memory.hold(self._call, request.ByteSize()):
                backoff = _FIRST_RETRY
                while (delay := await self._attempt(request, number)) is not None:
                    await asyncio.sleep(max(delay, backoff))
                    backoff = min(2 * backoff, _LAST_RETRY)
        except ImageMemoryFull as error:
            self._answers.put_nowait((self._refuse(request, number, error, self._call.request_id), True))

    async def _attempt(self, request: Any, number: int, final: bool = False) -> float | None:
        """Runs one request, as CallInterceptor runs a call.

        Returns None if it has ended, else the seconds until it may be tried again; a `final` attempt ends it.
        """
        metadata = self._context.invocation_metadata() or ()
        call = call_of(self._method, metadata, self._context.peer())
        call = replace(call, request_id=f"{current().request_id}-{number + 1}")
        with self._telemetry.call(call) as outcome:
            try:
                with self._access.admitted(call, metadata) as admitted, answering(admitted):
                    outcome.client = admitted.client
                    async with aclosing(self._respond(request, number)) as responses:
                        async for response, last in responses:
                            self._answers.put_nowait((response, last))
            except asyncio.CancelledError:
                outcome.status = cancelled_status(self._context.time_remaining())
                raise
            except Exception as caught:  # noqa: BLE001 - outermost handler
                error = failed(caught, call, outcome)
                if not final and isinstance(error, Exhausted) and error.retry_after is not None:
                    return error.retry_after
                self._answers.put_nowait((self._refuse(request, number, error, call.request_id), True))
        return None

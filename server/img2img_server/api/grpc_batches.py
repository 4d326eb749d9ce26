"""Frees what gRPC's batches of operations hold, also if their call is cancelled.

grpc.aio frees a batch's metadata and messages only if the batch succeeds and somebody still awaits it. So each call that a client
resets leaves up to 1 KB of native memory behind (https://github.com/grpc/grpc/issues/43360, open in grpcio 1.85). Here gRPC's own
function always runs to its end: to it a failed batch looks like a successful one, and cancellation does not reach it.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from grpc._cython import cygrpc

_execute = cygrpc.execute_batch
CALL_IS_GONE = (cygrpc.InternalError, cygrpc._ServerStoppedError)
"""What gRPC raises if a call's client has left or the server has stopped."""


class _Outcome(asyncio.Future[None]):
    """The future that gRPC awaits. It succeeds even if the batch fails, and keeps the error."""

    failure: BaseException | None = None

    def set_exception(self, exception: type | BaseException, /) -> None:
        """Keeps the error."""
        self.failure = exception() if isinstance(exception, type) else exception
        self.set_result(None)


class _Loop:
    """The event loop, as far as gRPC uses it for a batch: it creates the future, and is called when the batch has ended."""

    def __init__(self, loop: asyncio.AbstractEventLoop, outcome: _Outcome) -> None:
        self._loop, self._outcome = loop, outcome

    def create_future(self) -> _Outcome:
        """The future of the batch."""
        return self._outcome

    def call_soon_threadsafe(self, callback: Callable[..., object], *arguments: object) -> None:
        """Called on the loop's thread, or on that of another loop: one of them takes the events of all."""
        on_this_thread = asyncio._get_running_loop() is self._loop
        (self._loop.call_soon if on_this_thread else self._loop.call_soon_threadsafe)(callback, *arguments)


async def execute_batch(call: Any, operations: tuple[Any, ...], loop: asyncio.AbstractEventLoop) -> None:
    """Runs a batch of operations of one call, as gRPC's own function does. Raises its ExecuteBatchError if the batch fails.

    If the task that awaits it is cancelled, the batch still ends on its own, and what it holds is freed then.
    """
    outcome, ended = _Outcome(loop=loop), loop.create_future()
    batch = _execute(call, operations, _Loop(loop, outcome))
    batch.send(None)  # begins it, up to the await of its future

    def end(_: object) -> None:
        with contextlib.suppress(StopIteration):
            batch.send(None)
        if not ended.done():
            ended.set_result(None)

    outcome.add_done_callback(end)
    await ended
    failure, outcome.failure = outcome.failure, None
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # its traceback has this frame


def free_failed_batches() -> None:
    """Has gRPC's asyncio servers and clients of this process use `execute_batch` from now on.

    gRPC logs an error for a client that leaves while its call's status is sent, if it hears of the failed batch first: such lines
    are dropped, as anybody can cause them.
    """
    cygrpc.execute_batch = execute_batch
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_failed_batch)


def _is_no_failed_batch(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("ExecuteBatchError raised in core")

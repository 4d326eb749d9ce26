"""Extensions of grpc.aio: handlers that can be added to a started server, and a workaround for a memory leak.

grpc.aio frees a batch's metadata and messages only if the batch succeeds and is still awaited. So each call that a client resets
leaks up to 1 KB of native memory (https://github.com/grpc/grpc/issues/43360, open in grpcio 1.85). This module always runs gRPC's
own function to its end: it presents a failed batch to it as a successful one, and shields it from cancellation.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import grpc
from grpc._cython import cygrpc

from img2img_server.errors import ServerStarting

_execute = cygrpc.execute_batch
CALL_IS_GONE = (cygrpc.InternalError, cygrpc._ServerStoppedError)
"""gRPC's exceptions if a call's client has disconnected or the server has stopped."""


class _Outcome(asyncio.Future[None]):
    """The future that gRPC awaits. It succeeds even if the batch fails, and keeps the error.

    It calls `end` at once: a callback of the future would wake the event loop once more for each batch.
    """

    failure: BaseException | None = None
    end: Callable[[], None]

    def set_result(self, result: None, /) -> None:
        """The batch has ended."""
        super().set_result(result)
        self.end()

    def set_exception(self, exception: type | BaseException, /) -> None:
        """Keeps the error."""
        self.failure = exception() if isinstance(exception, type) else exception
        self.set_result(None)


class _Loop:
    """The part of the event loop that gRPC uses for a batch: it creates the future and schedules the batch's end."""

    def __init__(self, loop: asyncio.AbstractEventLoop, outcome: _Outcome) -> None:
        self._loop, self._outcome = loop, outcome

    def create_future(self) -> _Outcome:
        """Returns the future of the batch."""
        return self._outcome

    def call_soon_threadsafe(self, callback: Callable[..., object], *arguments: object) -> None:
        """Schedules `callback`, which ends the batch. gRPC calls this on any loop's thread: one loop polls the events of all. On
        this loop's thread it is called at once, as gRPC does if it was given the loop itself."""
        if asyncio._get_running_loop() is self._loop:
            callback(*arguments)
        else:
            self._loop.call_soon_threadsafe(callback, *arguments)


async def execute_batch(call: Any, operations: tuple[Any, ...], loop: asyncio.AbstractEventLoop) -> None:
    """Runs a batch of operations of one call, as gRPC's own function does. Raises its ExecuteBatchError if the batch fails.

    If the awaiting task is cancelled, the batch still runs to its end and then frees its memory.
    """
    outcome, ended = _Outcome(loop=loop), loop.create_future()
    batch = _execute(call, operations, _Loop(loop, outcome))

    def end() -> None:
        try:
            with contextlib.suppress(StopIteration):
                batch.send(None)
        finally:
            if not ended.done():
                ended.set_result(None)

    outcome.end = end
    batch.send(None)  # starts it, up to the await of its future
    await ended
    failure, outcome.failure = outcome.failure, None
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # its traceback refers to this frame


def free_failed_batches() -> None:
    """Makes grpc.aio's servers and clients in this process use `execute_batch`.

    gRPC may log an error for a client that disconnects while its call's status is sent. These lines are dropped, since any client
    can cause them.
    """
    cygrpc.execute_batch = execute_batch
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_failed_batch)


def _is_no_failed_batch(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("ExecuteBatchError raised in core")


_RETRY_AFTER = 1.0
"""Retry delay, in seconds, of a call that arrives before the services are ready."""


class Handlers(grpc.GenericRpcHandler):
    """The handlers of a started gRPC server. Generated `add_...Servicer_to_server` functions take `as_server`.

    gRPC does not allow handlers to be added to a started server, but it queries this object for each call. Until `ready` is set,
    calls of methods without a handler are refused with ServerStarting.
    """

    def __init__(self) -> None:
        self.ready = False
        self._handlers: list[grpc.GenericRpcHandler] = []

    @property
    def as_server(self) -> grpc.aio.Server:
        """This object, typed for generated code, which only adds handlers to a server."""
        return cast(grpc.aio.Server, self)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Adds the handlers of a service."""
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: "Mapping[str, grpc.RpcMethodHandler[Any, Any]]") -> None:
        """Does nothing: generated code also adds the same methods as generic handlers."""

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """The handler of one call; None if the method does not exist."""
        for handlers in self._handlers:
            if (found := handlers.service(details)) is not None:
                return found
        return None if self.ready else _STARTING


def starting() -> ServerStarting:
    """The error of a call that arrives before the services are ready."""
    return ServerStarting("the server is starting and loads its models: try again later", _RETRY_AFTER)


async def _refuse(requests: Any, context: Any) -> Any:
    """Refuses a call without reading its message."""
    raise starting()


_STARTING: "grpc.RpcMethodHandler[Any, Any]" = grpc.stream_unary_rpc_method_handler(_refuse)

"""Handlers of a server that listens before its services are ready. Until then calls are refused with a retryable error."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import grpc

from img2img_server.errors import ServerStarting

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

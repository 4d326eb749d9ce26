"""The services of a server that listens before they are ready: until then their calls are refused, and may be sent again."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import grpc

from img2img_server.errors import ServerStarting

_RETRY_AFTER = 1.0
"""Seconds after which a call that came too early may be sent again."""


class Handlers(grpc.GenericRpcHandler):
    """The handlers of a gRPC server that has started; `as_server` is what generated `add_...Servicer_to_server` functions take.

    gRPC allows no handlers to be added to a server that has started, but asks this object for each call. Until `ready` is set,
    a method without a handler is refused with ServerStarting.
    """

    def __init__(self) -> None:
        self.ready = False
        self._handlers: list[grpc.GenericRpcHandler] = []

    @property
    def as_server(self) -> grpc.aio.Server:
        """This object for generated code, which only adds handlers to a server."""
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
    """The error of a call that comes before the services are ready."""
    return ServerStarting("the server is starting and loads its models: try again later", _RETRY_AFTER)


async def _refuse(requests: Any, context: Any) -> Any:
    """Refuses a call before its message is read."""
    raise starting()


_STARTING: "grpc.RpcMethodHandler[Any, Any]" = grpc.stream_unary_rpc_method_handler(_refuse)

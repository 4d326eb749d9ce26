"""The grpc.health.v1 service. A watcher that does not read delays neither other watchers nor the server."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

from img2img_server.errors import InvalidField, ServiceNotFound
from img2img_server.support.call import current
from img2img_server.support.client_limit import ClientLimit

MAX_WATCHES = 4096
"""Maximum concurrent Watch calls of all clients."""
MAX_CLIENT_WATCHES = 256
"""Maximum concurrent Watch calls of one client. Health checks need no token, so a client is an address."""
_MAX_NAME = 1024
"""Maximum characters of a service's name, which a watch keeps in memory."""
_RETRY_SECONDS = 10.0

SERVING = pb.HealthCheckResponse.SERVING
NOT_SERVING = pb.HealthCheckResponse.NOT_SERVING


class _Watch:
    """One watcher's unread status; None if it has read the latest."""

    def __init__(self, status: int) -> None:
        self.status: int | None = status
        self.changed = asyncio.Event()
        self.changed.set()


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Check and Watch of the statuses that the server sets. Source: grpc's doc/health-checking.md.

    Each watcher's own task writes to its client. Setting a status replaces the watcher's unread status and never blocks. Used on
    the event loop only.
    """

    def __init__(self, max_watches: int = MAX_WATCHES, max_client_watches: int = MAX_CLIENT_WATCHES) -> None:
        self._limit = ClientLimit("health watches", max_watches, max_client_watches, _RETRY_SECONDS)
        self._statuses: dict[str, int] = {"": NOT_SERVING}
        self._watches: dict[str, set[_Watch]] = {}
        self._draining = False
        self._closed = False

    def set(self, service: str, serving: bool) -> None:
        """Sets the status of `service`, "" for the whole server, and wakes its watchers. It is NOT_SERVING while draining."""
        status = SERVING if serving and not self._draining else NOT_SERVING
        self._statuses[service] = status
        for watch in self._watches.get(service, ()):
            watch.status = status
            watch.changed.set()

    def is_serving(self, service: str = "") -> bool:
        """Whether the status of `service` is SERVING."""
        return self._statuses.get(service) == SERVING

    def drain(self) -> None:
        """Sets every service to NOT_SERVING for good."""
        self._draining = True
        for service in list(self._statuses):
            self.set(service, False)

    def close(self) -> None:
        """Drains, and ends each watch once its client has read the last status."""
        self.drain()
        self._closed = True
        for watch in itertools.chain.from_iterable(self._watches.values()):
            watch.changed.set()

    async def Check(self, request: pb.HealthCheckRequest, context: Any) -> pb.HealthCheckResponse:
        """Returns the status of a service. Raises ServiceNotFound if it is unknown."""
        _check_name(request.service)
        status = self._statuses.get(request.service)
        if status is None:
            raise ServiceNotFound("unknown service: use '' for the server or 'models/ID' for a model")
        return pb.HealthCheckResponse(status=status)

    async def Watch(self, request: pb.HealthCheckRequest, context: Any) -> AsyncGenerator[pb.HealthCheckResponse, None]:
        """Yields the status of a service now and after each change, SERVICE_UNKNOWN while it is unknown. A slow client gets only
        the latest status.

        Raises Exhausted or ClientBusy if there are too many watches.
        """
        _check_name(request.service)
        with self._watching(request.service) as watch:
            sent = None
            while True:
                await watch.changed.wait()
                watch.changed.clear()
                status, watch.status = watch.status, None
                if status is not None and status != sent:
                    sent = status
                    yield pb.HealthCheckResponse(status=status)
                if self._closed and watch.status is None:
                    return

    @contextmanager
    def _watching(self, service: str) -> Iterator[_Watch]:
        """Yields a watch of `service`, registered and counted within the block."""
        with self._limit.held(current().client):
            watch = _Watch(self._statuses.get(service, pb.HealthCheckResponse.SERVICE_UNKNOWN))
            watches = self._watches.setdefault(service, set())
            watches.add(watch)
            try:
                yield watch
            finally:
                watches.remove(watch)
                if not watches:
                    self._watches.pop(service, None)


def _check_name(service: str) -> None:
    if len(service) > _MAX_NAME:
        raise InvalidField("service", f"service has {len(service)} characters, the maximum is {_MAX_NAME}")

"""The HTTP port: with the server's TLS certificate, served by uvicorn's protocol on the server's event loop, and drained."""

import asyncio
import contextlib
import logging
import socket
from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from img2img_server.access.access import Access
from img2img_server.api.assets import AssetService
from img2img_server.api.health import HealthServicer
from img2img_server.api.http.app import App
from img2img_server.api.http.connection import Connection, Limits
from img2img_server.api.http.forms import BodyLimits
from img2img_server.api.http.images import Images
from img2img_server.api.http.models import ModelList
from img2img_server.api.models import ModelService
from img2img_server.api.tls import server_context
from img2img_server.api.transform import ImageToImageService
from img2img_server.api.transport import HANDSHAKE_SECONDS, Readers, max_connections
from img2img_server.codecs.pool import ImageMemory
from img2img_server.config import ServerConfig
from img2img_server.engine.interface import EngineInterface
from img2img_server.support.listen_addresses import address_of, check_port
from img2img_server.telemetry.telemetry import Telemetry

_log = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
"""Open at a time, if the process may open as many files: a quarter of gRPC's. Each has one request at a time."""
_BACKLOG = 1024
_TLS_SHUTDOWN = 2.0
_LEAVING = 1.0
"""Maximum seconds to wait for calls whose connection has ended."""


class HttpFront:
    """OpenAI's image API on `http_port` of the server's host. Used on the event loop only.

    The port opens first; requests are refused with ServerStarting until `serve` is called.
    """

    def __init__(
        self,
        config: ServerConfig,
        access: Access,
        telemetry: Telemetry,
        readers: Readers,
        health: HealthServicer,
        limits: Limits | None = None,
    ) -> None:
        self._config = config
        self._limits = limits or Limits(min(MAX_CONNECTIONS, max_connections() // 4))
        self._app = App(access, telemetry, readers, health)
        self._state = ServerState()
        # Without proxy_headers a client is identified by its own address, as in gRPC, not by a header.
        self._uvicorn = Config(
            self._app, lifespan="off", ws="none", interface="asgi3", log_config=None, proxy_headers=False, server_header=False
        )
        self._uvicorn.load()
        self._servers: list[asyncio.Server] = []
        self._none_left = asyncio.Event()
        self.port = 0

    async def open(self) -> None:
        """Binds the port. Raises OSError if it is in use."""
        assert self._config.http_port is not None, "the front exists only if http_port is set"
        host, port = self._config.host.removeprefix("[").removesuffix("]"), self._config.http_port
        check_port("http_port", host, port)
        context = None if self._config.tls.certificate is None else server_context(self._config.tls, ["http/1.1"])
        loop = asyncio.get_running_loop()
        times = (None, None) if context is None else (HANDSHAKE_SECONDS, _TLS_SHUTDOWN)
        for listening in _sockets(host, port):
            self._servers.append(
                await loop.create_server(
                    self.connection,
                    sock=listening,
                    ssl=context,
                    backlog=_BACKLOG,
                    ssl_handshake_timeout=times[0],
                    ssl_shutdown_timeout=times[1],
                )
            )
        self.port = self._servers[0].sockets[0].getsockname()[1]
        _log.info("HTTP on %s://%s", "http" if context is None else "https", address_of(host, self.port))

    def connection(self) -> Connection:
        """The protocol of a new connection."""
        return Connection(self._uvicorn, self._state, self._limits, self._lost)

    def serve(
        self,
        transforms: ImageToImageService,
        models: ModelService,
        assets: AssetService,
        runner: EngineInterface,
        memory: ImageMemory,
    ) -> None:
        """Sets the services that answer requests. Until then, requests are refused with ServerStarting."""
        limits = BodyLimits(self._config.max_message_bytes)
        self._app.serve(Images(transforms, assets, runner, memory, limits), ModelList(models))

    async def close(self, seconds: float) -> None:
        """Closes the port and idle connections, and waits up to `seconds` for requests. Then it aborts their connections.

        Takes at most `seconds` and one more second, whatever the clients do.
        """
        for server in self._servers:
            server.close()
        connections = self._state.connections
        for connection in list(connections):
            connection.shutdown()
        if connections:
            self._none_left.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._none_left.wait()
        for connection in list(connections):
            connection.transport.abort()
        if self._state.tasks:
            _, left = await asyncio.wait(self._state.tasks, timeout=_LEAVING)
            for task in left:
                task.cancel()

    def _lost(self) -> None:
        if not self._state.connections:
            self._none_left.set()


def _sockets(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on every address of `host`, on one port. "::" accepts IPv4 as well, as in gRPC."""
    sockets: list[socket.socket] = []
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, _, _, _, address in dict.fromkeys(found):
        at: Any = (address[0], port, *address[2:])
        dual = family == socket.AF_INET6 and address[0] == "::" and socket.has_dualstack_ipv6()
        sockets.append(socket.create_server(at, family=family, dualstack_ipv6=dual, backlog=_BACKLOG))
        port = sockets[0].getsockname()[1]
    return sockets

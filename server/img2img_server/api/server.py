"""The gRPC server: bind, load, serve, drain."""

import asyncio
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc
from img2img.v1 import asset_pb2_grpc, image_to_image_pb2, image_to_image_pb2_grpc, model_pb2_grpc

from img2img_server.access.access import Access
from img2img_server.api import transport
from img2img_server.api.assets import AssetService
from img2img_server.api.grpc_extensions import Handlers, free_failed_batches
from img2img_server.api.health import HealthServicer
from img2img_server.api.interceptors import CallInterceptor
from img2img_server.api.models import ModelService
from img2img_server.api.parsing import Parser
from img2img_server.api.provenance import Provenance
from img2img_server.api.tls import bind, check
from img2img_server.api.transform import ImageToImageService
from img2img_server.api.transport import Readers
from img2img_server.assets.store import AssetStore
from img2img_server.backends.base import Backend
from img2img_server.codecs.pool import Codecs, ImageMemory
from img2img_server.config import ServerConfig
from img2img_server.errors import EngineStuck, ShuttingDown
from img2img_server.sources.reading import Sources
from img2img_server.support.distribution import install_hint
from img2img_server.support.threads import in_thread
from img2img_server.telemetry.telemetry import Telemetry

if TYPE_CHECKING:
    from img2img_server.api.http.front import HttpFront

_log = logging.getLogger(__name__)

SERVICE = image_to_image_pb2.DESCRIPTOR.services_by_name["ImageToImageService"].full_name
_MOST_PROCESSES = 9
"""Maximum default processes of a codec stage. Each takes about 25 MB."""
_REFLECTED = (
    SERVICE,
    "img2img.v1.ModelService",
    "img2img.v1.AssetService",
    health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
    reflection.SERVICE_NAME,
)


_SENDING = 3.0
"""Seconds that clients have to read their results after the engine has drained."""
_ABANDONING = 1.0
"""Seconds to end requests and send their errors if the server stops without draining."""


class Server:
    """A gRPC server over one backend, which runs requests in this process or in a cluster.

    The port opens first. Until the backend is ready, health is NOT_SERVING and calls are refused with ServerStarting. Then health
    is SERVING, and NOT_SERVING again while the server drains.
    """

    def __init__(self, config: ServerConfig, backend: Backend) -> None:
        self._config = config
        self._backend = backend
        self._assets = AssetStore(config.assets)
        self._sources = Sources(config.sources, self._assets, config.image_limits)
        self._telemetry = Telemetry(config.telemetry)
        self._health = HealthServicer()
        self._failed = asyncio.Event()
        self._memory = ImageMemory(config.codecs.memory)
        self._codecs = Codecs(_processes(config.codecs.decoders), _processes(config.codecs.encoders), self._memory)
        self._readers = Readers(config.reader_timeout)
        self._server: grpc.aio.Server | None = None
        self._http: HttpFront | None = None
        self._handlers = Handlers()
        self._stopped = False
        self._stuck = False
        self._names = ["", SERVICE]
        self.port = 0

    @property
    def grace(self) -> float:
        """Seconds that running requests have to finish when the server drains."""
        return self._config.grace

    @property
    def metrics_port(self) -> int | None:
        """The port of the metrics, None if they are disabled."""
        return self._telemetry.metrics_port

    @property
    def http_port(self) -> int | None:
        """The port of OpenAI's image API, None if it is disabled."""
        return None if self._http is None else self._http.port

    @property
    def stuck(self) -> bool:
        """Whether the engine is blocked in a model call."""
        return self._stuck

    async def start(self) -> None:
        """Binds the port, opens the backend and serves. Raises BundleError, OSError or ValueError on failure.

        If the server is stopped before it serves, this closes everything and returns.
        """
        check(self._config)
        if self._config.kserve:
            _require_kserve()
        access = Access(self._config.tokens)
        if self._config.port_file is not None:
            _reserve(self._config.port_file)
        self._provenance = Provenance(self._config.provenance)
        self._telemetry.start()
        await self._listen(access)
        try:
            await self._open()
        except Exception:
            if not self._stopped:
                raise
            _log.info("the server was stopped before it was ready", exc_info=_log.isEnabledFor(logging.DEBUG))
        if self._stopped:
            await self._close_unserved()  # closes resources that were opened after `stop` had run
            return
        backend = self._backend
        self._telemetry.watch(backend.runner, backend.models, backend.cache, self._assets, self._codecs)
        self._add_services(access)
        for name in (*self._names, *(f"models/{name}" for name in backend.models.pipelines())):
            self._health.set(name, True)
        _log.info("serving on %s:%d", self._config.host, self.port)
        await backend.start(self._fail)
        if self._config.port_file is not None:
            _write_port(self._config.port_file, self.port)

    async def stop(self) -> None:
        """Drains: refuses new requests and lets running ones finish within the grace period, then ends them."""
        self._stopped = True
        if self._server is None or not self._handlers.ready:
            await self._close_unserved()
            return
        self._health.drain()
        await self._backend.drain(self._config.grace)
        self._health.close()
        # Finished results still have to be encoded and sent.
        await self._close_ports(_SENDING)
        await self._codecs.close()
        await self._sources.close()
        await self._assets.close()
        await in_thread(self._telemetry.close)
        await self._backend.close()
        if self._config.port_file is not None:
            self._config.port_file.unlink(missing_ok=True)

    async def stop_now(self) -> None:
        """Ends all requests with an error without waiting for the engine. The process must exit afterwards."""
        if self._config.port_file is not None:
            self._config.port_file.unlink(missing_ok=True)
        if self._server is None or not self._handlers.ready:
            return
        self._health.close()
        await self._backend.abandon(ShuttingDown("the server stopped before the request was finished"))
        await self._close_ports(_ABANDONING)
        self._codecs.kill()
        self._backend.close_now()

    async def failed(self) -> None:
        """Waits until the engine is stuck, so that the process must exit."""
        await self._failed.wait()

    async def _listen(self, access: Access) -> None:
        """Opens the ports. Calls are refused until `_add_services`."""
        if self._config.http_port is not None:
            self._http = _http_front(self._config, access, self._telemetry, self._readers, self._health)
        self._server = self._make_server(access)
        await self._server.start()
        if self._http is not None:
            await self._http.open()
        for name in self._names:
            self._health.set(name, False)
        _log.info("listening on %s:%d, not ready yet", self._config.host, self.port)

    async def _open(self) -> None:
        """Opens assets, sources, backend and codecs."""
        await self._assets.open()
        await self._sources.open()
        await self._backend.open(self._set_model_health, self._telemetry.span)
        await self._codecs.start()

    async def _close_unserved(self) -> None:
        """Closes the ports and everything that was opened before the server was ready."""
        await self._close_ports(0.0)
        self._telemetry.close()
        await self._codecs.close()
        await self._sources.close()
        await self._assets.close()
        await self._backend.close()

    async def _close_ports(self, seconds: float) -> None:
        """Closes both APIs. Clients have `seconds` to read their responses before their calls end."""
        grpc_end = () if self._server is None else (self._server.stop(seconds or None),)
        http_end = () if self._http is None else (self._http.close(seconds),)
        await asyncio.gather(*grpc_end, *http_end)

    async def _fail(self, why: str) -> None:
        """Ends all requests with EngineStuck and reports the failure to `failed`."""
        self._stuck = True
        _log.critical("%s", why)
        self._health.drain()
        try:
            async with asyncio.timeout(_ABANDONING):  # the stuck call may hold a lock
                await self._backend.abandon(EngineStuck("the device does not respond: the server exits"))
        finally:
            self._failed.set()

    def _set_model_health(self, name: str, serving: bool) -> None:
        self._health.set(f"models/{name}", serving)

    def _make_server(self, access: Access) -> grpc.aio.Server:
        """Creates a server on the bound port with health checks and reflection. `_add_services` adds the other services."""
        free_failed_batches()
        server = grpc.aio.server(
            interceptors=[
                CallInterceptor(
                    access,
                    self._telemetry,
                    self._memory,
                    partial(transport.message_bytes, self._config),
                    self._readers,
                )
            ],
            options=transport.options(self._config),
        )
        server.add_generic_rpc_handlers((self._handlers,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._handlers.as_server)
        reflected = list(_REFLECTED)
        if self._config.kserve:
            from img2img_server.api.kserve import service as kserve

            reflected.append(kserve.NAME)
            self._names.append(kserve.NAME)
        _add_reflection(self._handlers.as_server, reflected)
        self.port = bind(server, self._config)
        return server

    def _add_services(self, access: Access) -> None:
        """Registers all services; from then on the server answers every method."""
        models, runner, residency = self._backend.models, self._backend.runner, self._backend.residency
        handlers = self._handlers
        parser = Parser(self._config, self._sources, runner.clock, self._codecs)
        transforms = ImageToImageService(
            parser, models, residency, runner, self._codecs, self._telemetry, self._assets, self._provenance, access
        )
        image_to_image_pb2_grpc.add_ImageToImageServiceServicer_to_server(transforms, handlers.as_server)
        model_service = ModelService(models, residency, self._config)
        model_pb2_grpc.add_ModelServiceServicer_to_server(model_service, handlers.as_server)
        assets = AssetService(self._assets, self._config.image_limits, self._codecs)
        asset_pb2_grpc.add_AssetServiceServicer_to_server(assets, handlers.as_server)
        if self._http is not None:
            self._http.serve(transforms, model_service, assets, runner, self._memory)
        if self._config.kserve:
            from img2img_server.api.kserve import service as kserve

            kserve.add(handlers, transforms, runner, model_service, self._health, access, self._telemetry, self._memory)
        handlers.ready = True


def _processes(setting: int | None) -> int:
    """The processes of a codec stage. The default is one per core plus one, so that one client cannot occupy all."""
    return min(os.cpu_count() or 1, _MOST_PROCESSES - 1) + 1 if setting is None else setting


def _add_reflection(server: grpc.aio.Server, services: Sequence[str]) -> None:
    """Adds reflection as v1alpha, which the Python package implements, and as v1, whose messages are the same.

    v1 is not listed, because the package has no descriptor of it.
    """
    servicer = reflection.aio.ReflectionServicer(service_names=services)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = grpc.method_handlers_generic_handler("grpc.reflection.v1.ServerReflection", {"ServerReflectionInfo": handler})
    server.add_generic_rpc_handlers((handlers,))


def _reserve(port_file: Path) -> None:
    """Checks that `port_file` can be written later. Raises OSError."""
    try:
        _part(port_file).touch()
    except OSError as error:
        raise OSError(f"port_file: {port_file} cannot be written: {error.strerror}") from None


def _write_port(path: Path, port: int) -> None:
    part = _part(path)
    part.write_text(f"{port}\n", encoding="ascii")
    part.replace(path)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _http_front(
    config: ServerConfig, access: Access, telemetry: Telemetry, readers: Readers, health: HealthServicer
) -> "HttpFront":
    """The HTTP front. Raises ValueError if its packages cannot be imported, or it cannot listen on this host."""
    if config.host.startswith("unix:"):
        raise ValueError("http_port needs an address to listen on: host is a Unix socket")
    try:
        from img2img_server.api.http.front import HttpFront
    except ImportError as error:
        raise ValueError(f"http_port needs '{error.name}': {install_hint('http')}") from None
    return HttpFront(config, access, telemetry, readers, health)


def _require_kserve() -> None:
    """Raises ValueError if Triton's client, which contains KServe's stubs, cannot be imported."""
    try:
        import tritonclient.grpc  # type: ignore[import-untyped]  # noqa: F401
    except (ImportError, RuntimeError):  # it raises RuntimeError if its gRPC packages are missing or too old
        raise ValueError(f"kserve needs Triton's client: {install_hint('kserve')}") from None

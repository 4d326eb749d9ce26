"""The server's life: bind, load, serve, drain."""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc
from img2img.v1 import asset_pb2_grpc, image_to_image_pb2, image_to_image_pb2_grpc, model_pb2_grpc

from img2img_server import transport
from img2img_server.access.access import Access
from img2img_server.asset_service import AssetService
from img2img_server.assets.store import AssetStore
from img2img_server.config import ServerConfig
from img2img_server.engine.cache import Cache
from img2img_server.engine.engine import Engine
from img2img_server.engine.spans import Span
from img2img_server.engine.warmup import WarmUp
from img2img_server.errors import EngineStuck, ShuttingDown
from img2img_server.interceptors import CallInterceptor
from img2img_server.model_service import ModelService
from img2img_server.models.residency import Residency
from img2img_server.models.store import ModelStore
from img2img_server.models.takeover import Contender, Takeover
from img2img_server.parsing import Parser
from img2img_server.service import ImageToImageService
from img2img_server.sources.reading import Sources
from img2img_server.telemetry.telemetry import Telemetry
from img2img_server.telemetry.timeline import Trace
from img2img_server.tls import bind, check
from img2img_server.watchdog import Watchdog

_log = logging.getLogger(__name__)

SERVICE = image_to_image_pb2.DESCRIPTOR.services_by_name["ImageToImageService"].full_name
_LOADING = 5.0
"""Seconds that a pipeline which is being loaded for a takeover gets at the end: nothing of it is needed."""
_REFLECTED = (
    SERVICE,
    "img2img.v1.ModelService",
    "img2img.v1.AssetService",
    health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
    reflection.SERVICE_NAME,
)


class Server:
    """One gRPC server over one engine. `load_models` blocks while it loads; it is run on a thread of its own.

    The port opens once every model is loaded and measured. Health is SERVING from then on, and NOT_SERVING while it drains.
    `cache` is the one that the models use, to tell at the end how it did. `contend` gives the engines that are to be built in the
    background and may take over from those that the models were loaded with; it must be quick, and raise nothing.
    """

    def __init__(
        self,
        config: ServerConfig,
        load_models: Callable[[], ModelStore],
        cache: Cache | None = None,
        contend: Callable[[ModelStore], Sequence[Contender]] = lambda models: (),
    ) -> None:
        self._config = config
        self._load_models = load_models
        self._cache = cache
        self._contend = contend
        self._takeover: Takeover | None = None
        self._trace: Trace | None = None
        self._residency: Residency | None = None
        self._watchdog: Watchdog | None = None
        self._assets = AssetStore(config.assets)
        self._sources = Sources(config.sources, self._assets, config.image_limits)
        self._telemetry = Telemetry(config.telemetry)
        self._health = health.aio.HealthServicer()
        self._failed = asyncio.Event()
        self._codecs = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="img2img-codec")
        self._engine: Engine | None = None
        self._server: grpc.aio.Server | None = None
        self._names = ["", SERVICE]
        self.port = 0

    @property
    def metrics_port(self) -> int | None:
        """Where metrics are served, None where they are not."""
        return self._telemetry.metrics_port

    async def start(self) -> None:
        """Loads the models, binds the port and serves. Raises BundleError, OSError or ValueError where that cannot be done."""
        check(self._config)
        access = Access(self._config.tokens)
        self._telemetry.start()
        await self._assets.open()
        await self._sources.open()
        models = await asyncio.to_thread(self._load_models)
        if self._config.trace is not None:
            self._trace = Trace(self._config.trace)
        engine = Engine(models.pipelines(), self._config.limits, observe=self._observe)
        await asyncio.to_thread(self._warm_up, models, engine)
        self._telemetry.watch(engine, models, self._cache, self._assets)
        self._residency = Residency(self._config.residency, models, engine, self._set_model_health)
        server = self._make_server(models, engine, self._residency, access)
        engine.start()
        self._engine, self._server = engine, server
        await server.start()
        self._names += [f"models/{name}" for name in models.pipelines()]
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        await self._residency.start()
        _log.info("serving on %s:%d", self._config.host, self.port)
        contenders = await asyncio.to_thread(self._contend, models)
        self._takeover = Takeover(engine, models, contenders)
        self._residency.withdraw = self._takeover.withdraw
        self._takeover.start()
        loop = asyncio.get_running_loop()
        self._watchdog = Watchdog(
            engine,
            self._config.watchdog,
            lambda why: loop.call_soon_threadsafe(self._stuck, why),
        )
        self._watchdog.start()
        if self._config.port_file is not None:
            _write_port(self._config.port_file, self.port)

    async def stop(self) -> None:
        """Drains: takes no new requests, lets the running ones finish within the grace period, then ends them."""
        if self._server is None or self._engine is None:
            self._telemetry.close()
            await self._sources.close()
            await self._assets.close()
            return
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        if self._takeover is not None:
            self._takeover.stop()
        if self._residency is not None:
            await self._residency.close()
        finished = await asyncio.to_thread(self._engine.drain, self._config.grace)
        _log.info("drained" if finished else "the grace period is over: ending what still runs")
        await asyncio.to_thread(self._engine.close)
        if self._watchdog is not None:
            self._watchdog.stop()
        # What has ended still has to be encoded and sent.
        await self._server.stop(grace=5)
        self._codecs.shutdown()
        await self._sources.close()
        await self._assets.close()
        await asyncio.to_thread(self._telemetry.close)
        if self._takeover is not None and not await asyncio.to_thread(self._takeover.join, _LOADING):
            _log.info("a takeover is left unfinished")
        if self._cache is not None:
            _log.info("cache: %s", self._cache.stats)
        if self._trace is not None:
            self._trace.close(caches=asdict(self._cache.stats) if self._cache is not None else {})
        if self._config.port_file is not None:
            self._config.port_file.unlink(missing_ok=True)

    async def stop_now(self) -> None:
        """Ends what runs and waits, and tells their callers, without waiting for the engine. The process has to end then."""
        if self._config.port_file is not None:
            self._config.port_file.unlink(missing_ok=True)
        if self._server is None or self._engine is None:
            return
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        if self._takeover is not None:
            self._takeover.stop()
        # Elsewhere, as it may wait for a lock that what is stuck holds.
        await asyncio.to_thread(self._engine.abandon, ShuttingDown("the server stopped before the request was finished"))
        await self._server.stop(grace=1)
        if self._trace is not None:
            self._trace.close()

    def _warm_up(self, models: ModelStore, engine: Engine) -> None:
        limits = self._config.limits
        warm_up = WarmUp(engine.costs, limits.max_batch_size, self._config.warm_up)
        for name, pipeline in models.pipelines().items():
            with models.growing(name):
                warm_up.run(name, pipeline)
            for line in engine.costs.describe(name, limits.max_batch_size):
                _log.info("model '%s': %s", name, line)

    async def failed(self) -> None:
        """Returns when the server can serve no more: its engine is stuck, and only the process's end can cure that."""
        await self._failed.wait()

    def _stuck(self, why: str) -> None:
        self._giving_up = asyncio.get_running_loop().create_task(self._give_up(why))

    async def _give_up(self, why: str) -> None:
        """Tells everybody who waits that this server is lost."""
        _log.critical("%s", why)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        assert self._engine is not None, "a watchdog looks at an engine"
        await asyncio.to_thread(self._engine.abandon, EngineStuck("the device does not answer: this server stops"))
        self._failed.set()

    def _observe(self, span: Span) -> None:
        if self._trace is not None:
            self._trace.observe(span)
        self._telemetry.span(span)

    async def _set_model_health(self, name: str, serving: bool) -> None:
        states = health_pb2.HealthCheckResponse
        if f"models/{name}" not in self._names:
            self._names.append(f"models/{name}")
        await self._health.set(f"models/{name}", states.SERVING if serving else states.NOT_SERVING)

    def _make_server(self, models: ModelStore, engine: Engine, residency: Residency, access: Access) -> grpc.aio.Server:
        server = grpc.aio.server(
            interceptors=[CallInterceptor(access, self._telemetry)],
            options=transport.options(self._config),
        )
        parser = Parser(self._config, self._sources, engine.clock, self._codecs)
        transforms = ImageToImageService(parser, models, residency, engine, self._codecs, self._telemetry, self._assets)
        image_to_image_pb2_grpc.add_ImageToImageServiceServicer_to_server(transforms, server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(models, residency), server)
        asset_pb2_grpc.add_AssetServiceServicer_to_server(AssetService(self._assets, self._config.image_limits), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        _add_reflection(server)
        self.port = bind(server, self._config)
        return server

    async def _set_health(self, status: Any) -> None:
        for name in self._names:
            await self._health.set(name, status)


def _add_reflection(server: grpc.aio.Server) -> None:
    """Reflection as v1alpha, which is what the Python package has, and under v1's name, whose messages are the same.

    v1 is answered but not listed: no descriptor of it is there to describe it with.
    """
    servicer = reflection.aio.ReflectionServicer(service_names=_REFLECTED)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = grpc.method_handlers_generic_handler("grpc.reflection.v1.ServerReflection", {"ServerReflectionInfo": handler})
    server.add_generic_rpc_handlers((handlers,))


def _write_port(path: Path, port: int) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(f"{port}\n", encoding="ascii")
    part.replace(path)

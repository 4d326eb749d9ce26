"""A real server on a free port, in this process, on an event loop of its own thread."""

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from img2img_server.access.access import Access
from img2img_server.api import server as server_module
from img2img_server.api.parsing import Parser
from img2img_server.api.provenance import Provenance
from img2img_server.api.server import Server
from img2img_server.api.transform import ImageToImageService
from img2img_server.assets.store import AssetStore
from img2img_server.backends.base import Backend
from img2img_server.backends.local import LocalBackend
from img2img_server.bundle.manifest import Manifest, Source, Verification
from img2img_server.codecs.pool import Codecs
from img2img_server.config import ServerConfig
from img2img_server.engine.cache import Cache
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Pipeline
from img2img_server.models.promotion import Candidate
from img2img_server.models.registry import Model, ModelRegistry
from img2img_server.models.residency import Residency
from img2img_server.sources.reading import Sources
from img2img_server.telemetry.telemetry import Telemetry
from kept_processes import KeptProcess


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that serves, and its event loop."""

    server: Server
    loop: asyncio.AbstractEventLoop

    @property
    def port(self) -> int:
        return self.server.port

    def stop(self) -> Future[None]:
        """Begins to drain."""
        return asyncio.run_coroutine_threadsafe(self.server.stop(), self.loop)


@contextlib.contextmanager
def running(
    load_models: Callable[[], ModelRegistry],
    candidates: Sequence[Candidate] = (),
    cache: Cache | None = None,
    **settings: object,
) -> Iterator[RunningServer]:
    """Runs a server until the block is left, which drains it. `settings` are ServerConfig's."""
    made = functools.partial(LocalBackend, load_models=load_models, cache=cache, candidates=lambda models: candidates)
    with running_backend(made, **settings) as server:
        yield server


@contextlib.contextmanager
def running_backend(make: Callable[[ServerConfig], Backend], **settings: object) -> Iterator[RunningServer]:
    """Runs a server over the backend that `make` gives. `settings` are ServerConfig's."""
    with starting(make, **settings) as (server, started):
        started.result(120)
        yield server


@contextlib.contextmanager
def starting(make: Callable[[ServerConfig], Backend], **settings: object) -> Iterator[tuple[RunningServer, Future[None]]]:
    """Begins to start a server; the future ends as its start does. Leaving the block drains it."""
    config = ServerConfig(**{"models": Path(), "port": 0, "warm_up": 0.0, **settings})  # type: ignore[arg-type]
    codecs = vars(server_module)["Codecs"]
    # A test may have put others there.
    with patch.object(server_module, "Codecs", functools.partial(Codecs, make=KeptProcess) if codecs is Codecs else codecs):
        server = Server(config, make(config))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="test-server", daemon=True)
    thread.start()
    try:
        yield RunningServer(server, loop), asyncio.run_coroutine_threadsafe(server.start(), loop)
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(120)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(120)
        loop.close()


def make_service(models: ModelRegistry, engine: Engine, codecs: Codecs) -> ImageToImageService:
    """The service over an engine, without a server around it."""
    config = ServerConfig(Path())
    assets = AssetStore(config.assets)
    sources = Sources(config.sources, assets, config.image_limits)
    parser = Parser(config, sources, engine.clock, codecs)
    residency = Residency(config.residency, models, engine, _no_health)
    return ImageToImageService(
        parser,
        models,
        residency,
        engine,
        codecs,
        Telemetry(config.telemetry),
        assets,
        Provenance(config.provenance),
        Access(None),
    )


def _no_health(name: str, serving: bool) -> None:
    """Ignores all events."""


def store(**pipelines: Pipeline) -> ModelRegistry:
    """A store of pipelines by id, as if each came from a bundle that was exported from "acme/<id>" at revision "r1"."""
    return ModelRegistry(
        [Model(name, manifest(f"acme/{name}"), pipeline) for name, pipeline in pipelines.items()],
        default="m" if "m" in pipelines else None,
    )


def manifest(repo_id: str) -> Manifest:
    return Manifest(
        source=Source(repo_id=repo_id, revision="r1", variant="fp16", allow_patterns=("*.json",)),
        pipeline_class="StableDiffusionImg2ImgPipeline",
        family="stable-diffusion",
        backend="onnx",
        components=(),
        files={},
        tools={},
        verification=Verification(passed=True),
    )

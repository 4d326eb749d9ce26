"""A server in this process, of two stand-ins for models, with limits that make every request quick."""

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fuzz_parts.rpcs import SECRET


@dataclass(frozen=True, slots=True)
class Served:
    """The server's port and its folder."""

    port: int
    folder: Path


@contextlib.contextmanager
def served() -> Iterator[Served]:
    """A server within the block. Its packages are imported here, so that a fuzzer can instrument them."""
    from img2img_server.api.server import Server
    from img2img_server.backends.local import LocalBackend
    from img2img_server.config import AssetSettings, ServerConfig
    from img2img_server.engine.scheduler import QueueLimits
    from img2img_server.images import ImageLimits
    from img2img_server.models.registry import ModelRegistry
    from soak_parts.stand_in import StandInPipeline, plant

    with tempfile.TemporaryDirectory(prefix=f"{SECRET}-") as name:
        folder = Path(name)
        for model in ("m", "second"):
            plant(folder / "models", model)
        config = ServerConfig(
            models=folder / "models",
            port=0,
            warm_up=0.0,
            default_model="m",
            assets=AssetSettings(url=str(folder / "assets"), quota=2**20),
            image_limits=ImageLimits(max_bytes=2**16, max_source_pixels=10_000, max_pixels=4_096),
            limits=QueueLimits(max_waiting=8),
            max_steps=10,
        )
        bundles = folder / "models"
        load = lambda: ModelRegistry.load(bundles, lambda bundle, manifest: StandInPipeline(0.0), "m")  # noqa: E731
        server = Server(config, LocalBackend(config, load))
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="fuzzed-server", daemon=True)
        thread.start()
        try:
            asyncio.run_coroutine_threadsafe(server.start(), loop).result(120)
            yield Served(server.port, folder)
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result(120)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(30)
            loop.close()

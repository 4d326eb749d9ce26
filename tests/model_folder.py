"""A folder of bundles that have only names and sizes, pipelines with simulated memory, and a meter of that memory."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fakes import Clock, FakePipeline
from img2img_server.bundle.manifest import Component, Manifest, digest_files, list_files, write_manifest
from img2img_server.config import ModelSettings
from img2img_server.engine.engine import Engine
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.errors import OutOfMemory
from img2img_server.models.downloads import EXPORTER
from img2img_server.models.memory import MemoryReading
from img2img_server.models.registry import ModelRegistry
from img2img_server.models.residency import Residency
from running import manifest

MB = 10**6
BASE = 50 * MB
"""The memory of the process without models."""


def make_bundle(folder: Path, weights: int = 100 * MB, repo_id: str = "") -> Path:
    """A bundle whose manifest lists so many bytes of weights."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "model.onnx").write_bytes(b"graph")
    files = digest_files(folder, list_files(folder))
    components = (Component("unet", "fp32", bytes=weights),)
    write_manifest(folder, replace(manifest(repo_id or f"acme/{folder.name}"), files=files, components=components))
    return folder


class LoadedPipeline(FakePipeline):
    """A pipeline that takes `bytes` until it is closed."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__()
        self.name, self.bytes, self.opened_bytes = name, size, 0
        self.closed_by = ""
        self.unopened_bytes = self.control_bytes = 0
        self.controls_opened = 0

    def open_control(self) -> None:
        """Opens its control graph of `unopened_bytes` of weights, which takes `control_bytes`."""
        self.controls_opened += 1
        self.unopened_bytes, self.bytes = 0, self.bytes + self.control_bytes

    def close(self) -> None:
        self.closed_by = threading.current_thread().name
        super().close()


class Memory:
    """Loads pipelines that take twice the bytes of their weights, or those of `sizes`, and measures the open ones. `peak` is the
    highest total, `loads` the names in order of loading. With `gpu`, models are in a GPU's memory of so many bytes, and loading
    one that does not fit runs out of memory."""

    def __init__(self) -> None:
        self.gpu: int | None = None
        self.opened: list[LoadedPipeline] = []
        self.sizes: dict[str, int] = {}
        self.peak = 0
        self.problems: dict[str, Exception] = {}
        self.prompts: dict[str, str] = {}
        self.gates: dict[str, threading.Event] = {}
        self.loading = threading.Event()
        self.threads: set[str] = set()
        self.loads: list[str] = []

    def load(self, bundle: Path, manifest: Manifest) -> LoadedPipeline:
        name = bundle.name
        self.loads.append(name)
        self.threads.add(threading.current_thread().name)
        self.loading.set()
        if name in self.gates:
            assert self.gates[name].wait(60)
        if name in self.problems:
            raise self.problems[name]
        pipeline = LoadedPipeline(name, self.sizes.get(name, 2 * manifest.components[0].bytes))
        if self.gpu is not None:
            pipeline.engine = "fake:cuda"
            if self.used + pipeline.bytes > self.gpu:
                raise OutOfMemory("the GPU has no memory for it")
        self.opened.append(pipeline)
        self.peak = max(self.peak, self.used)
        return pipeline

    @property
    def used(self) -> int:
        return sum(pipeline.bytes for pipeline in self.opened if not pipeline.closed)

    @property
    def names(self) -> list[str]:
        """The open models, in order of loading."""
        return [pipeline.name for pipeline in self.opened if not pipeline.closed]

    def read(self) -> MemoryReading:
        return MemoryReading(BASE + self.used) if self.gpu is None else MemoryReading(BASE, self.used, self.gpu - self.used)


class Rig:
    """A residency over a folder of bundles, with a running engine. `serving` is the last health of each model."""

    def __init__(self, folder: Path, settings: ModelSettings, exporter: Sequence[str], limits: QueueLimits | None = None) -> None:
        self.memory, self.clock = Memory(), Clock()
        self.store = ModelRegistry.load(folder, self.memory.load, settings=settings, meter=self.memory)
        self.engine = Engine(self.store.pipelines(), limits)
        self.serving: dict[str, bool] = {}
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        change = self.store.change

        def changed(name: str, **values: Any) -> None:
            change(name, **values)
            self._loop.call_soon_threadsafe(self._changed.set)

        self.store.change = changed  # type: ignore[method-assign]
        self.residency = Residency(
            settings, self.store, self.engine, self._tell, meter=self.memory, exporter=exporter, clock=self.clock
        )

    async def until(self, holds: Callable[[], object]) -> None:
        """Returns once the condition holds for the store; the test's timeout bounds the wait."""
        while not holds():
            self._changed.clear()
            await self._changed.wait()

    def _tell(self, name: str, serving: bool) -> None:
        self.serving[name] = serving


@asynccontextmanager
async def rig(folder: Path, exporter: Sequence[str] = EXPORTER, **settings: object) -> AsyncIterator[Rig]:
    """A running Rig. No model is loaded by default; `settings` are those of ModelSettings."""
    made = Rig(folder, ModelSettings(**{"preload": ("none",), **settings}), exporter)  # type: ignore[arg-type]
    made.engine.start()
    await made.residency.start()
    try:
        yield made
    finally:
        await made.residency.close()
        made.engine.close()

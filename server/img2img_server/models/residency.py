"""Residency: keeps models in memory while they are used, and evicts idle ones (LRU) if memory is needed.

`ModelResolver` finds a request's model, and downloads it if that is allowed.
"""

import asyncio
import functools
import itertools
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from img2img_server.bundle.manifest import Source
from img2img_server.config import ModelSettings
from img2img_server.engine.engine import Engine
from img2img_server.engine.warmup import WarmUp
from img2img_server.errors import (
    ModelMemoryFull,
    ModelNotFound,
    ModelNotLoaded,
    ModelUnavailable,
    PermissionDenied,
    ServerError,
    ShuttingDown,
)
from img2img_server.models.cost_store import CostStore
from img2img_server.models.downloads import EXPORTER, Backoff, Downloads
from img2img_server.models.loader import ModelLoader
from img2img_server.models.memory import Meter, ProcessMeter, in_words, session_bytes, unopened
from img2img_server.models.registry import WHY, Model, ModelRegistry, ModelState
from img2img_server.support.call import current
from img2img_server.support.threads import in_thread


class ModelResolver:
    """Finds models for the current call, in the registry, in the folder, or by a download. Used only on the event loop."""

    def __init__(
        self, settings: ModelSettings, models: ModelRegistry, exporter: Sequence[str], clock: Callable[[], float]
    ) -> None:
        self._models = models
        self._downloads = Downloads(settings, models.folder.root if models.folder else None, exporter, clock)

    async def find(self, reference: Source, named: str) -> str:
        """The id of the model that matches `reference`, the message's field `named`.

        Raises ModelNotFound, InvalidField, PermissionDenied, and ModelUnavailable or Exhausted if it cannot be exported.
        """
        allowed = current().may_use
        try:
            name = self._models.find(reference, allowed).id
        except ModelNotFound as error:
            name = await self._find_new(reference, named, error)
        if self._downloads.pending(name):
            await self._downloads.wait(name)
        return name

    async def close(self) -> None:
        """Cancels all exports and starts no more."""
        await self._downloads.close()

    async def _find_new(self, reference: Source, named: str, not_found: ModelNotFound) -> str:
        """Finds a model that is not in the registry: a new bundle in the folder, or one to export into it."""
        if reference.path is not None:
            _check_allowed(reference.path)
            if await asyncio.to_thread(self._models.discover, reference.path):
                return self._models.find(reference, current().may_use).id
        if reference.path is not None or reference.repo_id is None or not self._downloads.allowed:
            raise not_found
        name = self._downloads.name_of(reference, named)
        _check_allowed(name)
        known = {model.id for model in self._models}
        if name in known or await asyncio.to_thread(self._models.discover, name):
            return name
        await self._downloads.obtain(
            reference,
            name,
            lambda detail: self._models.change(name, loading=True, detail=f"exporting: {detail}"),
            lambda made: self._exported(name, made),
        )
        return name

    def _exported(self, name: str, made: bool) -> None:
        if not made or not self._models.discover(name):
            self._models.forget(name)


def _check_allowed(name: str) -> None:
    """Raises PermissionDenied if the caller may not use a model of this name, whether it exists or not."""
    if not current().may_use(name):
        raise PermissionDenied(f"your token does not allow the model {ascii(name)[:100]}")


_log = logging.getLogger(__name__)

Health = Callable[[str, bool], None]


@dataclass(slots=True, eq=False)
class _Place:
    """A model's slot: its users, its waiting callers, and the tasks that load or unload it.

    `used` is the number of its last use, counted over all models. `idle` is set while there are no `leases`. `loading` returns
    the error of a failed load, `leaving` the freed bytes, and `extending` opens its control graph; they are None if no such task
    runs.
    """

    leases: int = 0
    waiting: int = 0
    used: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    loading: "asyncio.Task[ServerError | None] | None" = None
    leaving: "asyncio.Task[int] | None" = None
    extending: "asyncio.Task[ServerError | None] | None" = None
    failures: Backoff = field(default_factory=Backoff)

    def __post_init__(self) -> None:
        self.idle.set()


class Residency:
    """Loads and unloads the models of `models`, on other threads, while `engine` runs.

    Loads are sequential, so that two of them never use the same free memory. `health` is called with the id of each model that
    becomes ready (True) or is no longer ready (False). `withdraw`, which may block, is called with a model's id before it is
    unloaded, to cancel its candidates. `warm_up` records the calls of a loaded model. `clock` is in seconds. Used only on the
    event loop.
    """

    def __init__(
        self,
        settings: ModelSettings,
        models: ModelRegistry,
        engine: Engine,
        health: Health,
        meter: Meter | None = None,
        exporter: Sequence[str] = EXPORTER,
        clock: Callable[[], float] = time.monotonic,
        costs: CostStore | None = None,
        warm_up: WarmUp | None = None,
    ) -> None:
        self._settings = settings
        self._models = models
        self._engine = engine
        self._health = health
        self._clock = clock
        self._loader = ModelLoader(models, engine, meter or ProcessMeter(), costs, warm_up)
        self._resolver = ModelResolver(settings, models, exporter, clock)
        self._places: defaultdict[str, _Place] = defaultdict(_Place)
        self._one_at_a_time = asyncio.Lock()
        self._uses = itertools.count(1)
        self._closing = False
        self.withdraw: Callable[[str], object] = lambda name: None

    async def start(self) -> None:
        """Reports the health of models that are not ready. The server reports that of the others when it serves."""
        for model in self._models:
            if model.pipeline is None:
                self._health(model.id, False)

    @asynccontextmanager
    async def using(self, reference: Source) -> AsyncIterator[Model]:
        """Keeps the model of `reference` in memory within the block; loads it first if that is allowed.

        Raises PermissionDenied, ModelNotFound, InvalidField, ModelNotLoaded, ModelUnavailable or ModelMemoryFull.
        """
        name = await self._resolver.find(reference, "model")
        place = self._places[name]
        model = await self._lease(name, place)
        try:
            yield model
        finally:
            place.leases -= 1
            place.used = next(self._uses)
            if not place.leases:
                place.idle.set()

    async def load(self, reference: Source) -> Model:
        """Loads a model and returns it. Ignores the backoff of a model that failed recently."""
        name = await self._resolver.find(reference, "source")
        place = self._places[name]
        place.waiting += 1
        try:
            while self._models.get(name).pipeline is None or place.leaving is not None:
                await self._bring(name, place, insist=True)
            place.used = next(self._uses)
            return self._models.get(name)
        finally:
            place.waiting -= 1

    async def unload(self, name: str) -> int:
        """Waits until the model `name` is idle, unloads it, and returns the freed bytes.

        A cancelled wait does not cancel the unload. Requests that arrive meanwhile wait for its end, and load the model again if
        that is allowed.
        """
        self._models.get(name, current().may_use)
        place = self._places[name]
        while place.loading is not None:
            await asyncio.shield(place.loading)
        if place.leaving is None:
            if self._models.get(name).pipeline is None:
                return 0
            place.leaving = asyncio.create_task(self._leave(name, place))
        return await asyncio.shield(place.leaving)

    async def open_control(self, name: str) -> None:
        """Opens the control graph of the model `name`, of which the caller has a lease, if it is not open. Evicts idle models for
        its memory before. A cancelled wait does not cancel it. Raises ModelUnavailable, ModelMemoryFull or BundleError."""
        place, pipeline = self._places[name], self._models.get(name).pipeline
        while pipeline is not None and unopened(pipeline):
            if place.extending is None:
                place.extending = asyncio.create_task(self._extend(name, place, unopened(pipeline)))
            if (error := await asyncio.shield(place.extending)) is not None:
                raise error

    async def _extend(self, name: str, place: _Place, weights: int) -> ServerError | None:
        """The task that opens a control graph with so many bytes of weights. Returns its error, or None."""
        try:
            async with self._one_at_a_time:
                if self._models.get(name).pipeline is not None:  # else its callers have left, and so has the model
                    await self._make_room(name, session_bytes(weights))
                    await self._make_room_on_gpu(name, session_bytes(weights))
                    await self._loader.open_control(name)
        except ServerError as error:
            return error
        finally:
            place.extending = None
        return None

    async def close(self) -> None:
        """Cancels loads and exports. The thread that loads a pipeline cannot be cancelled and is abandoned."""
        self._closing = True
        await self._resolver.close()
        places = self._places.values()
        tasks = [task for place in places for task in (place.loading, place.leaving, place.extending) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _lease(self, name: str, place: _Place) -> Model:
        """Waits until the model is ready, and takes a lease of it."""
        place.waiting += 1
        try:
            while place.leaving is not None or self._models.get(name).pipeline is None:
                if place.leaving is None and not self._settings.load_on_request:
                    raise ModelNotLoaded(
                        f"model '{name}' is not loaded, and this server does not load models on request: load it with LoadModel"
                    )
                await self._bring(name, place)
        finally:
            place.waiting -= 1
        place.leases += 1
        place.used = next(self._uses)
        place.idle.clear()
        return self._models.get(name)

    async def _bring(self, name: str, place: _Place, insist: bool = False) -> None:
        """Waits for the end of an unload, or loads the model. All waiting callers share the load; a cancelled wait does not
        cancel it."""
        if place.leaving is not None:
            await asyncio.shield(place.leaving)
            return
        if place.loading is None:
            if self._closing:
                raise ShuttingDown("the server is shutting down")
            if self._models.get(name).bundle is None:
                raise self._unavailable(name)
            if insist:
                place.failures.clear()
            if (left := place.failures.left(self._clock())) > 0:
                raise self._unavailable(name, f"; the next attempt is possible in {left:.0f} s")
            place.loading = asyncio.create_task(self._load(name, place))
        if (error := await asyncio.shield(place.loading)) is not None:
            raise error

    async def _load(self, name: str, place: _Place) -> ServerError | None:
        """The task of a load. Returns its error, or None."""
        try:
            self._models.change(name, loading=True, detail="waiting for another model to load")
            async with self._one_at_a_time:
                try:
                    await self._make_room(name)
                    await self._make_room_on_gpu(name)
                    problem = await self._loader.bring(name, lambda: self._evict_for(name))
                    if problem:
                        place.failures.count(self._clock(), problem)
                        return self._unavailable(name)
                    # It may be larger than estimated.
                    await self._make_room(name)
                except ServerError:
                    await self._loader.discard(name)  # before the next load, which may need its memory
                    raise
            self._models.change(name, loading=False)
            self._loader.publish(name)
            place.failures.clear()
            self._health(name, True)
        except ServerError as error:
            return error
        except asyncio.CancelledError:
            return ShuttingDown("the server is shutting down")
        finally:
            place.loading = None
            if self._models.get(name).pipeline is None:
                self._models.change(name, loading=False)
        return None

    def _unavailable(self, name: str, then: str = "") -> ModelUnavailable:
        """The error for callers of a model that failed."""
        return ModelUnavailable(f"model '{name}' cannot be served: {self._models.get(name).detail or WHY}{then}")

    async def _make_room_on_gpu(self, name: str, more: int = 0) -> None:
        """Evicts idle models (LRU) until the GPU has enough memory for the model `name`, by estimate, or for `more` bytes of it.
        If no other model can be evicted, it is loaded all the same: the estimate may be too high."""
        needed = more or self._models.get(name).expected_memory
        while (free := (await self._loader.read()).gpu_free) is not None and needed > free:
            if not await self._evict_for(name):
                return

    async def _evict_for(self, name: str) -> bool:
        """Evicts the least recently used idle model. Returns False if there is none, or `name` is larger than the GPU."""
        victim, reading, model = self._least_recently_used(name), await self._loader.read(), self._models.get(name)
        too_large = reading.gpu_total is not None and model.weight_bytes > reading.gpu_total
        if victim is None or too_large:
            return False
        _log.info("model '%s' is evicted to load '%s'", victim, name)
        place = self._places[victim]
        place.leaving = asyncio.create_task(self._leave(victim, place, locked=True))
        await asyncio.shield(place.leaving)
        return True

    async def _make_room(self, name: str, more: int = 0) -> None:
        """Evicts idle models (LRU) until the model `name` fits, with `more` bytes if it is loaded. Raises ModelUnavailable or
        ModelMemoryFull."""
        budget, needed = self._settings.memory, self._models.get(name).expected_memory + more
        if budget is None:
            return
        if needed > budget:
            detail = f"it takes about {in_words(needed)}, and models_memory is {in_words(budget)}"
            if more:
                raise ModelUnavailable(f"model '{name}' cannot run with controls or image prompts: {detail}")
            self._models.change(name, detail=detail)
            raise ModelUnavailable(f"model '{name}' cannot be loaded: {detail}")
        while (used := sum(model.expected_memory for model in self._others(name))) + needed > budget:
            if not await self._evict_for(name):
                if not more:
                    self._models.change(name, detail="")
                wait = max(1.0, self._engine.stats.work_seconds or 0.0)
                detail = f"takes about {in_words(needed)}, and {in_words(used)} of {in_words(budget)} are in use"
                raise ModelMemoryFull(f"not enough memory for model '{name}' now: it {detail}", retry_after=wait)

    def _others(self, name: str) -> list[Model]:
        return [model for model in self._models if model.id != name and model.state is ModelState.READY]

    def _least_recently_used(self, but: str) -> str | None:
        """The least recently used idle model, None if all are in use, requested or being unloaded."""
        names = [model.id for model in self._others(but)]
        idle = [name for name in names if not self._in_use(self._places[name])]
        return min(idle, key=lambda name: self._places[name].used, default=None)

    def _in_use(self, place: _Place) -> bool:
        return bool(place.leases or place.waiting or place.leaving is not None)

    async def _leave(self, name: str, place: _Place, locked: bool = False) -> int:
        """The task of an unload. Returns the freed bytes. `locked` says whether the caller holds the lock of loads."""
        try:
            self._models.change(name, detail="being unloaded")
            await in_thread(lambda: self.withdraw(name))
            await place.idle.wait()
            # The engine may still run requests whose callers have left.
            if not await in_thread(lambda: self._engine.wait_until_idle(name)):
                return 0
            free = functools.partial(self._loader.free, name, self._health)
            if locked:
                return await free()
            async with self._one_at_a_time:
                return await free()
        except asyncio.CancelledError:
            return 0
        finally:
            self._models.change(name, detail="")
            place.leaving = None

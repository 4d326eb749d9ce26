"""Residency: which models are in memory, who uses them, and who has to leave when there is no room.

`ModelResolver` finds what a name means.
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
from img2img_server.models.downloads import Backoff, Downloads
from img2img_server.models.export_process import EXPORTER
from img2img_server.models.failures import WHY
from img2img_server.models.loader import ModelLoader
from img2img_server.models.memory import Meter, ProcessMeter, in_words, weight_bytes
from img2img_server.models.registry import Model, ModelRegistry, ModelState
from img2img_server.support.call import current
from img2img_server.support.threads import in_thread


class ModelResolver:
    """Finds models of `models` for the current call, and those that it does not know yet. Used on the event loop only."""

    def __init__(
        self, settings: ModelSettings, models: ModelRegistry, exporter: Sequence[str], clock: Callable[[], float]
    ) -> None:
        self._models = models
        self._downloads = Downloads(settings, models.folder.root if models.folder else None, exporter, clock)

    async def find(self, reference: Source, named: str) -> str:
        """The id of the model that is meant; `named` is the message's field.

        Raises ModelNotFound, InvalidField, PermissionDenied, and ModelUnavailable or Exhausted where it cannot be exported.
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
        """Ends what is being exported, and begins nothing more."""
        await self._downloads.close()

    async def _find_new(self, reference: Source, named: str, not_found: ModelNotFound) -> str:
        """What was not in the store: a bundle that is in its folder by now, or one to be exported into it."""
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
    """Raises PermissionDenied where the caller may not use a model of this name, whether there is one or not."""
    if not current().may_use(name):
        raise PermissionDenied(f"your token does not allow the model {ascii(name)[:100]}")


_log = logging.getLogger(__name__)

Health = Callable[[str, bool], None]


@dataclass(slots=True, eq=False)
class _Place:
    """A model's place in memory: who uses it, who waits for it, and what is being done about it.

    `used` grows with each use of any model. `idle` is set while there are no `leases`. The tasks are None where nothing of the
    kind is under way; `loading` gives the error of a load that failed, `leaving` the bytes that came back.
    """

    leases: int = 0
    waiting: int = 0
    used: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    loading: "asyncio.Task[ServerError | None] | None" = None
    leaving: "asyncio.Task[int] | None" = None
    failures: Backoff = field(default_factory=Backoff)

    def __post_init__(self) -> None:
        self.idle.set()


class Residency:
    """Loads and unloads the models of `models`, on threads of its own, while `engine` runs the others.

    Loads come one after the other, so that two of them never take the same room. `health` is told the id of each model that can
    or can no longer be served. `withdraw`, which may block, is called before a model is unloaded with its id: whoever else is at
    work on it lets go. `warm_up` records the calls of a model that is loaded. `clock` gives seconds. Used on the event loop only.
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
        self._mover = ModelLoader(models, engine, meter or ProcessMeter(), costs, warm_up)
        self._finder = ModelResolver(settings, models, exporter, clock)
        self._places: defaultdict[str, _Place] = defaultdict(_Place)
        self._one_at_a_time = asyncio.Lock()
        self._uses = itertools.count(1)
        self._closing = False
        self.withdraw: Callable[[str], object] = lambda name: None

    async def start(self) -> None:
        """Tells the health of the models that are not ready. Of the others the server itself tells when it serves."""
        for model in self._models:
            if model.pipeline is None:
                self._health(model.id, False)

    @asynccontextmanager
    async def using(self, reference: Source) -> AsyncIterator[Model]:
        """Within the block the model that `reference` means is in memory and stays there; it is loaded first where that is
        allowed.

        Raises what tells the caller why it cannot have it: PermissionDenied, ModelNotFound, InvalidField, ModelNotLoaded,
        ModelUnavailable, ModelMemoryFull.
        """
        name = await self._finder.find(reference, "model")
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
        """Makes a model ready, and returns it. One that failed a short while ago is tried again all the same."""
        name = await self._finder.find(reference, "source")
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
        """Waits until nobody uses the model `name`, frees its memory, and returns how many bytes that gave back.

        Leaving early does not end it. Requests that come meanwhile wait for the end, and have it loaded again where that is
        allowed.
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

    async def close(self) -> None:
        """Ends what is being loaded or exported. A pipeline whose loading cannot be ended is left to its thread."""
        self._closing = True
        await self._finder.close()
        tasks = [task for place in self._places.values() for task in (place.loading, place.leaving) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _lease(self, name: str, place: _Place) -> Model:
        """Takes a lease of the model, once it is ready."""
        place.waiting += 1
        try:
            while place.leaving is not None or self._models.get(name).pipeline is None:
                if place.leaving is None and not self._settings.load_on_request:
                    raise ModelNotLoaded(f"model '{name}' is not loaded, and this server does not load models on request")
                await self._bring(name, place)
        finally:
            place.waiting -= 1
        place.leases += 1
        place.used = next(self._uses)
        place.idle.clear()
        return self._models.get(name)

    async def _bring(self, name: str, place: _Place, insist: bool = False) -> None:
        """Takes a step towards having the model ready: waits until it has left, or loads it. All who wait share that, and one who
        leaves does not end it."""
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
                raise self._unavailable(name, f". It is tried again in {left:.0f} s")
            place.loading = asyncio.create_task(self._load(name, place))
        if (error := await asyncio.shield(place.loading)) is not None:
            raise error

    async def _load(self, name: str, place: _Place) -> ServerError | None:
        """The task of a load: what it failed with."""
        try:
            self._models.change(name, loading=True, detail="waits for its turn to be loaded")
            async with self._one_at_a_time:
                try:
                    await self._make_room(name)
                    await self._make_room_on_gpu(name)
                    problem = await self._mover.bring(name, lambda: self._evict_for(name))
                    if problem:
                        place.failures.count(self._clock(), problem)
                        return self._unavailable(name)
                    # It may take more than was estimated.
                    await self._make_room(name)
                except ServerError:
                    await self._mover.discard(name)  # before the next one's turn, which may need the room
                    raise
            self._models.change(name, loading=False)
            self._mover.publish(name)
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
        """What a caller gets for a model that failed."""
        return ModelUnavailable(f"model '{name}' cannot be served: {self._models.get(name).detail or WHY}{then}")

    async def _make_room_on_gpu(self, name: str) -> None:
        """Unloads what was not used for longest until the GPU has room for the model `name`, by what it is expected to take. If
        no other can leave, it is tried all the same: the estimate may be too high."""
        needed = self._models.get(name).expected_memory
        while (free := (await self._mover.read()).gpu_free) is not None and needed > free:
            if not await self._evict_for(name):
                return

    async def _evict_for(self, name: str) -> bool:
        """Unloads the model that was idle for longest. False if there is none, or `name` is larger than the whole GPU."""
        victim, reading = self._least_recently_used(name), await self._mover.read()
        manifest = self._models.get(name).manifest
        too_large = reading.gpu_total is not None and manifest is not None and weight_bytes(manifest) > reading.gpu_total
        if victim is None or too_large:
            return False
        _log.info("model '%s' makes room for '%s'", victim, name)
        place = self._places[victim]
        place.leaving = asyncio.create_task(self._leave(victim, place, locked=True))
        await asyncio.shield(place.leaving)
        return True

    async def _make_room(self, name: str) -> None:
        """Unloads what was not used for longest until the model `name` fits. Raises ModelUnavailable or ModelMemoryFull."""
        budget, needed = self._settings.memory, self._models.get(name).expected_memory
        if budget is None:
            return
        if needed > budget:
            detail = f"it takes about {in_words(needed)}, and all models together may take {in_words(budget)}"
            self._models.change(name, detail=detail)
            raise ModelUnavailable(f"model '{name}' cannot be loaded: {detail}")
        while (used := sum(model.expected_memory for model in self._others(name))) + needed > budget:
            if not await self._evict_for(name):
                self._models.change(name, detail="")
                wait = max(1.0, self._engine.stats.work_seconds or 0.0)
                said = f"takes about {in_words(needed)}, and {in_words(used)} of {in_words(budget)} are in use"
                raise ModelMemoryFull(f"there is no room for model '{name}' now: it {said}", retry_after=wait)

    def _others(self, name: str) -> list[Model]:
        return [model for model in self._models if model.id != name and model.state is ModelState.READY]

    def _least_recently_used(self, but: str) -> str | None:
        """The model that was idle for longest, None where all are in use, wanted or leaving already."""
        names = [model.id for model in self._others(but)]
        idle = [name for name in names if not self._in_use(self._places[name])]
        return min(idle, key=lambda name: self._places[name].used, default=None)

    def _in_use(self, place: _Place) -> bool:
        return bool(place.leases or place.waiting or place.leaving is not None)

    async def _leave(self, name: str, place: _Place, locked: bool = False) -> int:
        """The task of an unload. `locked` says whether the turn to change what is loaded has been taken for it."""
        try:
            self._models.change(name, detail="being unloaded")
            await in_thread(lambda: self.withdraw(name))
            await place.idle.wait()
            # Requests whose callers have left may still be in.
            if not await in_thread(lambda: self._engine.wait_until_idle(name)):
                return 0
            free = functools.partial(self._mover.free, name, self._health)
            if locked:
                return await free()
            async with self._one_at_a_time:
                return await free()
        except asyncio.CancelledError:
            return 0
        finally:
            self._models.change(name, detail="")
            place.leaving = None

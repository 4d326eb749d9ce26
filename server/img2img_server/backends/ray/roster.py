"""The models of all replicas, as a front sees them: which there are, who has them in memory, and how busy everybody is."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

from img2img_server.backends.ray.messages import (
    Card,
    LoadModel,
    Look,
    ModelAnswer,
    ReplicaLeft,
    ReplicaLost,
    Replicas,
    Unloaded,
    raise_lost,
)
from img2img_server.bundle.manifest import Source
from img2img_server.engine.request import Failed, Pipeline, Plan, Request
from img2img_server.errors import ModelNotFound, ModelUnavailable, NoReplica
from img2img_server.models.registry import Model, ModelRegistry, ModelState
from img2img_server.models.residency import Health
from img2img_server.support.call import current

_log = logging.getLogger(__name__)

LOOK_EVERY = 0.5
"""Seconds between two looks at the replicas."""
_FIRST_LOOKS = 20
COME_BACK = 2.0
"""Seconds after which a caller may try again where no replica is there: about what Ray takes to notice and to begin another."""
_TRIES = 3
"""Times that something about a model is asked, each of another replica, where the one before was lost."""


@dataclass(frozen=True, slots=True)
class RemotePipeline:
    """What is known here of a pipeline that runs elsewhere: what requests are read by. The names are those of Pipeline, and of
    its methods there is `plan`; the others are called by engines only, and there is none here."""

    engine: str
    size_multiple: int
    native_size: tuple[int, int]
    schedulers: tuple[str, ...]

    def plan(self, request: Request) -> Plan:
        """About what the request will cost. What is wrong with it is found by the replica."""
        return plan(request)


def plan(request: Request) -> Plan:
    """About what a request will cost on any pipeline."""
    width, height = request.image.size
    rows = len(request.seeds) * (2 if request.guidance_scale > 1 else 1)
    return Plan((width, height), width * height, rows, int(request.num_inference_steps * request.strength))


class Roster:
    """Looks at the replicas every now and then. `models` has every model that one of them has, and is READY where one of them
    has it in memory. `health` is told the id of each that can or can no longer be served. Used on the event loop only, but for
    `models` and `loads`.
    """

    def __init__(self, replicas: Replicas, health: Health, clock: Callable[[], float] = time.monotonic) -> None:
        self._replicas = replicas
        self._health = health
        self._clock = clock
        self._told: dict[str, bool] = {}
        self._watching: asyncio.Task[None] | None = None
        self.models = ModelRegistry(())
        self.loads: tuple[LoadModel, ...] = ()
        """How busy those are that answered the last look; none where nobody did."""
        self.looked = clock()
        """When they were asked, and, while nobody answers, when somebody last did."""

    async def open(self, default: str | None) -> None:
        """The first look, again while nobody answers: Ray may not have told this front yet of those that are ready. Raises
        NoReplica where nobody does, BundleError where there is no model `default`."""
        for _ in range(_FIRST_LOOKS):
            if looks := await self._look():
                break
            await asyncio.sleep(LOOK_EVERY)
        else:
            raise NoReplica("no replica answers", COME_BACK)
        self.models = ModelRegistry(_merged(looks), default or looks[0].default)

    def start(self, changed: Callable[[], object]) -> None:
        """Looks from now on. `changed` is called after each look."""
        self._watching = asyncio.create_task(self._watch(changed))

    async def close(self) -> None:
        """Looks no more."""
        if self._watching is not None:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching

    async def look(self) -> None:
        """Takes up what the replicas have to tell."""
        looks = await self._look()
        for model in _merged(looks):
            self.models.put(model)
        gone = {model.id for model in self.models} - {card.id for look in looks for card in look.cards}
        for name in gone:
            if looks:
                self.models.forget(name)
            else:
                self.models.change(name, pipeline=None, loading=False, detail="no replica can be reached")
        self._tell_health()

    def note(self, card: Card) -> Model:
        """Takes up what one of them said of a model before all are asked again."""
        model = _model((card,), 1)
        self.models.put(model)
        return model

    async def _look(self) -> Sequence[Look]:
        asked = self._clock()
        looks: Sequence[Look] = ()
        try:
            answers: Sequence[Look] = await self._replicas.everywhere("look")
            # One that is stuck is about to be replaced, and has work for ever.
            looks = [look for look in answers if look.load.seconds != math.inf]
        except ReplicaLost as error:
            _log.debug("nobody answers: %s", error)
        if looks:
            self.looked = asked
        if bool(looks) != bool(self.loads):
            _log.info("%d replicas answer", len(looks))
        self.loads = tuple(look.load for look in looks)
        return looks

    async def _watch(self, changed: Callable[[], object]) -> None:
        while True:
            try:
                await self.look()
                changed()
            except Exception:  # noqa: BLE001 - the edge of a task that nobody awaits: the next look may do better
                _log.exception("the replicas could not be looked at")
            await asyncio.sleep(LOOK_EVERY)

    def _tell_health(self) -> None:
        states = {model.id: model.state is ModelState.READY for model in self.models}
        states = {**dict.fromkeys(self._told, False), **states}
        for name, serving in states.items():
            if self._told.get(name) is not serving:
                self._told[name] = serving
                self._health(name, serving)


class RemoteModels:
    """Which models can be used, by asking the replicas that have them, and all of them to load and unload."""

    def __init__(self, replicas: Replicas, roster: Roster) -> None:
        self._replicas = replicas
        self._roster = roster

    @asynccontextmanager
    async def using(self, reference: Source) -> AsyncIterator[Model]:
        """The model that `reference` means. Where no replica has it in memory, one is asked to load it first.

        Nothing holds it there: a replica that unloads it meanwhile answers, or loads it again, as a server of its own would.
        """
        model = self._known(reference)
        if model is None or model.pipeline is None:
            name = "" if model is None else model.id
            model = self._roster.note(await self._ask("bring", ModelAnswer(current(), reference, name)))
        yield model

    async def load(self, reference: Source) -> Model:
        """Makes a model ready on one replica, which may have to fetch it, and then on all. Raises the error of the first, or
        of the others where none of them could."""
        card = await self._ask("load", ModelAnswer(current(), reference))
        answers = await self._replicas.everywhere("load", ModelAnswer(current(), Source(path=card.id)))
        self._good(answers)
        await self._roster.look()
        return self._roster.models.get(card.id)

    async def unload(self, name: str) -> int:
        """Has all replicas free the model's memory. Returns the bytes that it gave back on all of them."""
        self._roster.models.get(name, current().may_use)
        answers: Sequence[Unloaded | Failed] = await self._replicas.everywhere("unload", ModelAnswer(current(), name=name))
        freed: int = sum(answer.freed for answer in self._good(answers))
        await self._roster.look()
        return freed

    def _known(self, reference: Source) -> Model | None:
        try:
            return self._roster.models.find(reference, current().may_use)
        except ModelNotFound:
            return None  # a replica may find it, or know where to get it

    async def _ask(self, method: Any, asked: ModelAnswer) -> Card:
        deaths = 0
        for _ in range(_TRIES):
            try:
                answer = await self._replicas.ask(method, asked)
                if isinstance(answer, Failed):
                    raise_lost(answer)
                    raise answer.error
            except ReplicaLost as error:
                _log.warning("a replica was lost that was to %s a model: %s", method, error)
                deaths += not isinstance(error, ReplicaLeft)
                continue
            return answer
        if deaths == _TRIES:  # not UNAVAILABLE: clients would ask for it again, and again
            raise ModelUnavailable(f"{deaths} replicas were lost, one after the other, while they loaded this model")
        raise NoReplica("no replica can be reached", COME_BACK)

    def _good(self, answers: Sequence[Any]) -> Sequence[Any]:
        """The answers that are no errors. Raises the first error where there are none."""
        good = [answer for answer in answers if not isinstance(answer, Failed)]
        if not good:
            raise answers[0].error if answers else NoReplica("no replica can be reached", COME_BACK)
        return good


def _merged(looks: Sequence[Look]) -> list[Model]:
    """The models of all replicas."""
    cards: dict[str, list[Card]] = {}
    for look in looks:
        for card in look.cards:
            cards.setdefault(card.id, []).append(card)
    return [_model(same, len(looks)) for same in cards.values()]


def _model(cards: Iterable[Card], replicas: int) -> Model:
    """A model of which several replicas tell: ready where one of them has it in memory."""
    best, *others = sorted(cards, key=lambda card: _RANK[card.state])
    pipeline = None
    detail = best.detail
    if best.state is ModelState.READY:
        pipeline = RemotePipeline(best.runs_on, best.size_multiple, best.native_size, best.schedulers)
        ready = 1 + sum(card.state is ModelState.READY for card in others)
        if ready < replicas:
            detail = detail or f"in the memory of {ready} of {replicas} replicas"
    return Model(
        id=best.id,
        manifest=best.manifest,
        pipeline=cast(Pipeline | None, pipeline),  # no engine here calls the methods that it has not
        problem=best.detail if best.state is ModelState.FAILED else "",
        engines=best.engines,
        loading=best.state is ModelState.LOADING,
        memory=max(card.memory for card in (best, *others)),
        detail=detail,
    )


_RANK = {ModelState.READY: 0, ModelState.LOADING: 1, ModelState.UNLOADED: 2, ModelState.FAILED: 3}
"""Which of several states counts: the one that is nearest to an answer."""

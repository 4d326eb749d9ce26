"""A front's view of all replicas: their models, which of them have a model in memory, and their load."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

from img2img_server.backends.ray.messages import (
    Card,
    Load,
    Look,
    ModelQuery,
    NoResponse,
    ReplicaLeft,
    ReplicaLost,
    Replicas,
    Unloaded,
    check_lost,
)
from img2img_server.bundle.manifest import Source
from img2img_server.engine.request import Failed, Pipeline, Plan, Request
from img2img_server.errors import ModelNotFound, ModelUnavailable, NoReplica
from img2img_server.models.registry import KINDS, Model, ModelRegistry, ModelState
from img2img_server.models.residency import Health
from img2img_server.support.call import current
from img2img_server.support.model_fields import GUIDED, ModelFields
from img2img_server.support.source_rule import STRETCHED, SourceRule

_log = logging.getLogger(__name__)

POLL_INTERVAL = 0.5
"""Seconds between two polls of the replicas."""
_FIRST_POLLS = 20
RETRY_AFTER = 2.0
"""Retry delay in seconds if there is no replica: about the time that Ray takes to notice and start another."""
PATIENCE = 60.0
"""Seconds that a replica may take to respond to polls, and that accepted requests wait for a new replica, which has to load its
models, if none is left."""
_TRIES = 3
"""Replicas to try with a query for a model, if the previous one is lost."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class RemotePipeline:
    """The properties of a replica's pipeline that parsing requests needs. Has the attributes of Pipeline and `plan`; the other
    methods are only called by an engine."""

    engine: str
    size_multiple: int
    native_size: tuple[int, int]
    schedulers: tuple[str, ...]
    source_rule: SourceRule = STRETCHED
    fields: ModelFields = field(default_factory=lambda: GUIDED)

    def plan(self, request: Request) -> Plan:
        """The approximate plan of a request. The replica validates the request."""
        return plan(request)


def plan(request: Request) -> Plan:
    """The approximate plan of a request on any pipeline."""
    width, height = request.result_size
    rows = len(request.seeds) * (2 if request.guidance_scale > 1 else 1)
    return Plan((width, height), width * height, rows, int(request.num_inference_steps * request.strength))


class Roster:
    """Polls the replicas. `models` contains the models of all replicas; a model is READY if a replica has it in memory. `health`
    is called with the id of each model that becomes available or unavailable. Used on the event loop only, except `models` and
    `loads`.
    """

    def __init__(self, replicas: Replicas, health: Health, clock: Callable[[], float] = time.monotonic) -> None:
        self._replicas = replicas
        self._health = health
        self._clock = clock
        self._reported: dict[str, bool] = {}
        self._polling: asyncio.Task[None] | None = None
        self._looks: dict[str, tuple[float, Look]] = {}
        """The time of each replica's last response to a poll, and the response, by the replica's name."""
        self.models = ModelRegistry(())
        self.loads: tuple[Load, ...] = ()
        """The loads of the replicas that responded to the last poll, and of slow replicas. Lost replicas have no load here."""
        self.polled = clock()
        """The time of the last poll that a replica responded to."""

    async def open(self, default: str | None) -> None:
        """Polls until a replica responds: Ray may not have announced ready replicas to this front yet. Raises NoReplica if none
        responds, and BundleError if there is no model `default`."""
        for _ in range(_FIRST_POLLS):
            if looks := await self._poll_replicas():
                break
            await asyncio.sleep(POLL_INTERVAL)
        else:
            raise NoReplica("no replica responds", RETRY_AFTER)
        self.models = ModelRegistry(_merged(looks), default or looks[0].default)

    def start(self, changed: Callable[[], object]) -> None:
        """Starts to poll regularly. `changed` is called after each poll."""
        self._polling = asyncio.create_task(self._keep_polling(changed))

    async def close(self) -> None:
        """Stops polling."""
        if self._polling is not None:
            self._polling.cancel()
            with suppress(asyncio.CancelledError):
                await self._polling

    async def poll(self) -> None:
        """Polls the replicas once and updates `models` and `loads`."""
        looks = await self._poll_replicas()
        for model in _merged(looks):
            self.models.put(model)
        gone = {model.id for model in self.models} - {card.id for look in looks for card in look.cards}
        for name in gone:
            if looks:
                self.models.forget(name)
            else:
                self.models.change(name, pipeline=None, loading=False, detail="no replica can be reached")
        self._report_health()

    def update(self, card: Card) -> Model:
        """Updates a model by the card of one replica, before the next poll."""
        model = _model((card,), 1)
        self.models.put(model)
        return model

    async def _poll_replicas(self) -> Sequence[Look]:
        """The last response of each replica. One that is too slow to respond counts as it was for at most PATIENCE."""
        begun = self._clock()
        responses: Sequence[Look | NoResponse] = ()
        try:
            responses = await self._replicas.everywhere("look")
        except ReplicaLost as error:
            _log.debug("no replica responds: %s", error)
        looks = {response.replica: (begun, response) for response in responses if isinstance(response, Look)}
        if _running(look for _, look in looks.values()):
            self.polled = begun
        if len(looks) < len(responses):  # which replicas are the slow ones is unknown
            _log.debug("%d of %d replicas are too slow to respond", len(responses) - len(looks), len(responses))
            recent = {name: seen for name, seen in self._looks.items() if begun - seen[0] <= PATIENCE}
            looks = {**recent, **looks}
        self._looks = looks
        running = _running(look for _, look in looks.values())
        if bool(running) != bool(self.loads):
            _log.info("%d replicas respond", len(running))
        self.loads = tuple(look.load for look in running)
        return running

    async def _keep_polling(self, changed: Callable[[], object]) -> None:
        while True:
            try:
                await self.poll()
                changed()
            except Exception:  # noqa: BLE001 - nothing awaits this task; the next poll may succeed
                _log.exception("polling the replicas failed")
            await asyncio.sleep(POLL_INTERVAL)

    def _report_health(self) -> None:
        states = {model.id: model.state is ModelState.READY for model in self.models}
        states = {**dict.fromkeys(self._reported, False), **states}
        for name, serving in states.items():
            if self._reported.get(name) is not serving:
                self._reported[name] = serving
                self._health(name, serving)


class RemoteModels:
    """Loads, unloads and finds models by queries to the replicas."""

    def __init__(self, replicas: Replicas, roster: Roster) -> None:
        self._replicas = replicas
        self._roster = roster

    @asynccontextmanager
    async def using(self, reference: Source) -> AsyncIterator[Model]:
        """Yields the model of `reference`. If no replica has it in memory, one of them loads it first.

        A replica may unload it meanwhile; then it handles the request as a local server does.
        """
        model = self._known(reference)
        if model is None or model.pipeline is None:
            name = "" if model is None else model.id
            model = self._roster.update(await self._ask("bring", ModelQuery(current(), reference, name)))
        yield model

    async def open_control(self, name: str) -> None:
        """Does nothing: the replica that runs the request does it."""

    async def load(self, reference: Source) -> Model:
        """Loads a model on one replica, which may download it, and then on all. Raises the error of the first, or an error of
        the others if all fail."""
        card = await self._ask("load", ModelQuery(current(), reference))
        self._successes(await self._replicas.everywhere("load", ModelQuery(current(), Source(path=card.id))))
        await self._roster.poll()
        return self._roster.models.get(card.id)

    async def unload(self, name: str) -> int:
        """Unloads a model on all replicas. Returns the total of freed bytes."""
        self._roster.models.get(name, current().may_use)
        responses: Sequence[Unloaded | Failed] = await self._replicas.everywhere("unload", ModelQuery(current(), name=name))
        freed: int = sum(response.freed for response in self._successes(responses))
        await self._roster.poll()
        return freed

    def _known(self, reference: Source) -> Model | None:
        try:
            return self._roster.models.find(reference, current().may_use)
        except ModelNotFound:
            return None  # a replica may find or download it

    async def _ask(self, method: Any, asked: ModelQuery) -> Card:
        deaths = 0
        for _ in range(_TRIES):
            try:
                response = await self._replicas.ask(method, asked)
                if isinstance(response, Failed):
                    check_lost(response)
                    raise response.error
            except ReplicaLost as error:
                _log.warning("lost a replica during its query to %s a model: %s", method, error)
                deaths += not isinstance(error, ReplicaLeft)
                continue
            return response
        if deaths == _TRIES:  # not UNAVAILABLE, which clients would retry again and again
            raise ModelUnavailable(f"{deaths} replicas were lost, one after the other, while they loaded this model")
        raise NoReplica("no replica can be reached", RETRY_AFTER)

    def _successes(self, responses: Sequence[Any]) -> Sequence[Any]:
        """The responses that are not errors. Raises the first error if all are."""
        successes = [response for response in responses if not isinstance(response, Failed)]
        if not successes:
            raise responses[0].error if responses else NoReplica("no replica can be reached", RETRY_AFTER)
        return successes


def _running(looks: Iterable[Look]) -> list[Look]:
    """Without stuck replicas, which have infinite work and will be replaced."""
    return [look for look in looks if look.load.seconds != math.inf]


def _merged(looks: Sequence[Look]) -> list[Model]:
    """The models of all replicas."""
    cards: dict[str, list[Card]] = {}
    for look in looks:
        for card in look.cards:
            cards.setdefault(card.id, []).append(card)
    return [_model(same, len(looks)) for same in cards.values()]


def _model(cards: Iterable[Card], replicas: int) -> Model:
    """Merges the cards of a model: it is ready if a replica has it in memory."""
    best, *others = sorted(cards, key=lambda card: _RANK[card.state])
    pipeline = None
    detail = best.detail
    if best.state is ModelState.READY:
        pipeline = RemotePipeline(
            best.runs_on, best.size_multiple, best.native_size, best.schedulers, best.source_rule, best.request_fields
        )
        ready = 1 + sum(card.state is ModelState.READY for card in others)
        if ready < replicas:
            detail = detail or f"in the memory of {ready} of {replicas} replicas"
    return Model(
        id=best.id,
        manifest=best.manifest,
        pipeline=cast(Pipeline | None, pipeline),  # methods that it lacks are only called by an engine
        problem=best.detail if best.state is ModelState.FAILED else "",
        engines=best.engines,
        loading=best.state is ModelState.LOADING,
        memory=max(card.memory for card in (best, *others)),
        detail=detail,
        **{name: getattr(best, name) for name in KINDS},
    )


_RANK = {ModelState.READY: 0, ModelState.LOADING: 1, ModelState.UNLOADED: 2, ModelState.FAILED: 3}
"""The order in which replicas' states take precedence."""

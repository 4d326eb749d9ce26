"""Messages between fronts and replicas, besides the engine's own events. All are pickled; images are pickled as raw RGB.

Deadlines are sent as remaining seconds, because the clocks differ.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol

from img2img_server.bundle.control_kinds import ControlKind
from img2img_server.bundle.image_adapters import PromptKind
from img2img_server.bundle.image_encoders import EncoderWidths
from img2img_server.bundle.manifest import Manifest, Source, Verification
from img2img_server.engine.request import Ending, Event, Failed, Request
from img2img_server.errors import EngineStuck, ShuttingDown
from img2img_server.models.registry import KINDS, EngineStatus, Model, ModelState
from img2img_server.support.call import Call
from img2img_server.support.model_fields import GUIDED, ModelFields
from img2img_server.support.source_rule import STRETCHED, SourceRule


class ReplicaLost(Exception):
    """The replica of a call has died or is unreachable. The call's progress is unknown; another replica may repeat it."""


class ReplicaLeft(ReplicaLost):
    """No replica had the call, or its replica was shutting down: the call is not the cause."""


@dataclass(frozen=True, slots=True)
class RemoteRequest:
    """A request for a replica. `request` has no deadline; the deadline is `seconds_left` after the message is received, None for
    none."""

    request: Request
    seconds_left: float | None

    @classmethod
    def of(cls, request: Request, now: float) -> "RemoteRequest":
        """Creates the message at time `now` of the clock of the request's deadline."""
        return cls(replace(request, deadline=None), None if request.deadline is None else request.deadline - now)

    @property
    def model(self) -> str:
        """The model's id, by which the message is routed."""
        return self.request.model

    def received(self, now: float) -> Request:
        """The request, received at time `now` of the clock for its deadline."""
        return replace(self.request, deadline=None if self.seconds_left is None else now + self.seconds_left)


def check_lost(ending: Ending) -> Ending:
    """Returns `ending`. Raises ReplicaLost if it is an error of the replica instead of the call."""
    if isinstance(ending, Failed) and isinstance(ending.error, ShuttingDown):
        raise ReplicaLeft(str(ending.error))
    if isinstance(ending, Failed) and isinstance(ending.error, EngineStuck):
        raise ReplicaLost(str(ending.error))
    return ending


@dataclass(frozen=True, slots=True)
class Card:
    """The description of a replica's model. The fields are those of a Model and of its pipeline: `runs_on` is the name of its
    engine, "" if it is not in memory. The manifest is reduced to the fields that a front reads, since cards are sent twice a
    second."""

    id: str
    manifest: Manifest | None
    state: ModelState
    memory: int
    detail: str
    engines: tuple[EngineStatus, ...] = ()
    runs_on: str = ""
    size_multiple: int = 1
    native_size: tuple[int, int] = (0, 0)
    schedulers: tuple[str, ...] = ()
    source_rule: SourceRule = STRETCHED
    request_fields: ModelFields = field(default_factory=lambda: GUIDED)
    control_kind: ControlKind = ()
    encoder_widths: EncoderWidths | None = None
    prompt_kind: PromptKind | None = None

    @classmethod
    def of(cls, model: Model) -> "Card":
        """The card of a model in the registry."""
        manifest = None if model.manifest is None else _brief(model.manifest)
        memory = model.memory + model.slot_memory
        kinds: dict[str, Any] = {name: getattr(model, name) for name in KINDS}
        card = cls(model.id, manifest, model.state, memory, model.detail, model.engines, **kinds)
        pipeline = model.pipeline
        if pipeline is None:
            return card
        return replace(
            card,
            runs_on=pipeline.engine,
            size_multiple=pipeline.size_multiple,
            native_size=pipeline.native_size,
            schedulers=tuple(pipeline.schedulers),
            source_rule=pipeline.source_rule,
            request_fields=pipeline.fields,
        )


@dataclass(frozen=True)
class BriefManifest(Manifest):
    """A manifest without its lists, which are ten times as large as the rest, but with its digest."""

    full_digest: str = ""

    @property
    def digest(self) -> str:
        """The digest of the full manifest."""
        return self.full_digest


def _brief(manifest: Manifest) -> BriefManifest:
    values = {item.name: getattr(manifest, item.name) for item in fields(Manifest)}
    values |= {"components": (), "files": {}, "tools": {}, "options": {}, "latent_preview": (), "loras": (), "references": ()}
    return BriefManifest(**{**values, "verification": Verification(manifest.verification.passed)}, full_digest=manifest.digest)


@dataclass(frozen=True, slots=True)
class Load:
    """A replica's load: the estimated `seconds` of accepted work, None if costs are unknown, the numbers of waiting and active
    requests, and the ids of the models in memory."""

    seconds: float | None
    waiting: int
    active: int
    resident: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Look:
    """A replica's response to a poll. `replica` is its unique name; the cards are in order of id."""

    replica: str
    load: Load
    cards: Sequence[Card]
    default: str | None


@dataclass(frozen=True, slots=True)
class NoResponse:
    """Stands for the response of a replica that takes too long to respond. It is busy, not lost: Ray replaces lost ones."""


@dataclass(frozen=True, slots=True)
class ModelQuery:
    """A query for a model: by `reference`, or by `name` if its id is known. `call` has the caller's permissions."""

    call: Call
    reference: Source = field(default_factory=Source)
    name: str = ""

    @property
    def model(self) -> str:
        """The model's id, by which the message is routed."""
        return self.name


@dataclass(frozen=True, slots=True)
class Unloaded:
    """A model was unloaded from a replica, which freed `freed` bytes."""

    freed: int


Everywhere = Literal["look", "load", "unload"]
"""Methods that are called on all replicas."""


class Replicas(Protocol):
    """The replicas of one application. Each method raises ReplicaLost if its replica is lost or there is none.

    Cancelling a call, or closing its stream, cancels it on the replica.
    """

    async def transform(self, job: RemoteRequest) -> Ending:
        """Runs a request on one replica."""
        ...

    def stream(self, job: RemoteRequest) -> AsyncGenerator[Event, None]:
        """Runs a request on one replica and yields its events."""
        ...

    async def ask(self, method: Literal["bring", "load"], asked: ModelQuery) -> Card | Failed:
        """Calls a model method of one replica."""
        ...

    async def everywhere(self, method: Everywhere, *arguments: Any) -> Sequence[Any]:
        """The responses of all replicas. Lost ones are omitted; a poll ("look") has a NoResponse for each that is too slow."""
        ...

"""What passes between a front and a replica. All of it is pickled, so none of it is what only one process understands.

Images are raw RGB: what is quickest to make and to read again, and no loss. Times are seconds that are left, as clocks differ.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from PIL import Image

from img2img_server.bundle.manifest import Manifest, Source, Verification
from img2img_server.engine.request import (
    Completed,
    Ending,
    Failed,
    Progress,
    Queued,
    Request,
    RequestWarning,
    Started,
    Timings,
)
from img2img_server.errors import EngineStuck, ShuttingDown
from img2img_server.models.registry import EngineStatus, Model, ModelState
from img2img_server.support.call import Call


class ReplicaLost(Exception):
    """The replica that had a call is gone, or cannot be reached: nobody knows how far it came. Another may do it again."""


class ReplicaLeft(ReplicaLost):
    """No replica had the call, or the one that had it was about to leave: the call is not why."""


@dataclass(frozen=True, slots=True)
class RawImage:
    """An RGB image: three bytes a pixel, row by row from the top."""

    width: int
    height: int
    data: bytes

    @classmethod
    def of(cls, image: Image.Image) -> "RawImage":
        """The image as a message."""
        return cls(image.width, image.height, image.tobytes())

    def image(self) -> Image.Image:
        """The image again. Its pixels are shared with the message, and are copied by whoever changes them."""
        return Image.frombuffer("RGB", (self.width, self.height), self.data, "raw", "RGB", 0, 1)


@dataclass(frozen=True, slots=True)
class RemoteRequest:
    """A Request on its way to a replica. Its fields are those of a Request, but for the image and the deadline, which is so
    many `seconds_left` from when it is read, None for none."""

    model: str
    picture: RawImage
    prompt: str
    negative_prompt: str | None
    strength: float
    num_inference_steps: int
    guidance_scale: float
    seeds: tuple[int, ...]
    seconds_left: float | None
    scheduler: str | None
    preview_interval: int
    image_digest: bytes
    client: str
    id: str
    follow: bool
    cache_scope: str

    @classmethod
    def of(cls, request: Request, now: float) -> "RemoteRequest":
        """The request as a message, sent at `now` of the clock that its deadline is measured on."""
        return cls(
            model=request.model,
            picture=RawImage.of(request.image),
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            strength=request.strength,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            seeds=request.seeds,
            seconds_left=None if request.deadline is None else request.deadline - now,
            scheduler=request.scheduler,
            preview_interval=request.preview_interval,
            image_digest=request.image_digest,
            client=request.client,
            id=request.id,
            follow=request.follow,
            cache_scope=request.cache_scope,
        )

    def request(self, now: float) -> Request:
        """The request again, read at `now` of the clock that its deadline is to be measured on."""
        return Request(
            model=self.model,
            image=self.picture.image(),
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            strength=self.strength,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            seeds=self.seeds,
            deadline=None if self.seconds_left is None else now + self.seconds_left,
            scheduler=self.scheduler,
            preview_interval=self.preview_interval,
            image_digest=self.image_digest,
            client=self.client,
            id=self.id,
            follow=self.follow,
            cache_scope=self.cache_scope,
        )

    def at(self, seconds_left: float | None) -> "RemoteRequest":
        """The same, sent again with so many seconds left."""
        return replace(self, seconds_left=seconds_left)


@dataclass(frozen=True, slots=True)
class RemoteCompleted:
    """A request's good end: Completed."""

    pictures: tuple[RawImage, ...]
    timings: Timings
    warnings: tuple[RequestWarning, ...] = ()

    @classmethod
    def of(cls, completed: Completed) -> "RemoteCompleted":
        """The ending as a message."""
        return cls(tuple(map(RawImage.of, completed.images)), completed.timings, completed.warnings)

    def completed(self) -> Completed:
        """The ending again."""
        return Completed(tuple(picture.image() for picture in self.pictures), self.timings, self.warnings)


@dataclass(frozen=True, slots=True)
class RemoteProgress:
    """A step is done: Progress."""

    step: int
    step_count: int
    eta: float | None
    preview: RawImage | None

    @classmethod
    def of(cls, progress: Progress) -> "RemoteProgress":
        """The event as a message."""
        preview = None if progress.preview is None else RawImage.of(progress.preview)
        return cls(progress.step, progress.step_count, progress.eta, preview)

    def progress(self) -> Progress:
        """The event again."""
        return Progress(self.step, self.step_count, self.eta, None if self.preview is None else self.preview.image())


Ended = RemoteCompleted | Failed
"""How a request ends. An error is an answer like any other: what is raised is for what no replica could answer."""
Told = Queued | Started | RemoteProgress | Ended
"""What a replica tells of a request that is followed."""


def ending_of(ended: Ended) -> Ending:
    """The ending again. Raises ReplicaLost where it is the replica that came to its end, and not the request."""
    if isinstance(ended, RemoteCompleted):
        return ended.completed()
    raise_lost(ended)
    return ended


def raise_lost(failed: Failed) -> None:
    """Raises ReplicaLost where an error is none of the call's, but the replica's end."""
    if isinstance(failed.error, ShuttingDown):
        raise ReplicaLeft(str(failed.error))
    if isinstance(failed.error, EngineStuck):
        raise ReplicaLost(str(failed.error))


@dataclass(frozen=True, slots=True)
class Card:
    """What a replica says of one of its models. The fields are those of a Model and of its pipeline: `runs_on` is the name of its
    engine, "" where it is not in memory. Of the manifest there is what a front reads: cards are sent twice a second."""

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

    @classmethod
    def of(cls, model: Model) -> "Card":
        """The card of a model of the store."""
        manifest = None if model.manifest is None else _brief(model.manifest)
        card = cls(model.id, manifest, model.state, model.memory, model.detail, model.engines)
        pipeline = model.pipeline
        if pipeline is None:
            return card
        return replace(
            card,
            runs_on=pipeline.engine,
            size_multiple=pipeline.size_multiple,
            native_size=pipeline.native_size,
            schedulers=tuple(pipeline.schedulers),
        )


def _brief(manifest: Manifest) -> Manifest:
    """Without its lists, which make it ten times as large."""
    verification = Verification(manifest.verification.passed)
    return replace(
        manifest,
        components=(),
        files={},
        tools={},
        verification=verification,
        options={},
        latent_preview=(),
        loras=(),
        references=(),
    )


@dataclass(frozen=True, slots=True)
class LoadModel:
    """How busy a replica is: the estimated `seconds` of what it has accepted, None where costs are unknown, the requests that
    wait and that are in progress, and the ids of the models that are in its memory."""

    seconds: float | None
    waiting: int
    active: int
    resident: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Look:
    """A replica at a glance. `replica` is a name of its own; the cards are in order of id."""

    replica: str
    load: LoadModel
    cards: Sequence[Card]
    default: str | None


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """A model that somebody wants: `reference` as the store understands it, `name` for an id that is known. `call` says who asks,
    as not everybody may use every model."""

    call: Call
    reference: Source = field(default_factory=Source)
    name: str = ""

    @property
    def model(self) -> str:
        """What it is routed by, as a Job is."""
        return self.name


@dataclass(frozen=True, slots=True)
class Unloaded:
    """A model has left a replica's memory, and gave back so many bytes."""

    freed: int


Everywhere = Literal["look", "load", "unload"]
"""What all replicas are asked."""


class Replicas(Protocol):
    """The replicas of one application. Each method raises ReplicaLost where the one that was asked is gone, or none is there.

    Cancelling a call, or closing its stream, cancels it at the replica.
    """

    async def transform(self, job: RemoteRequest) -> Ended:
        """Has one of them run a request."""
        ...

    def stream(self, job: RemoteRequest) -> AsyncGenerator[Told, None]:
        """Has one of them run a request and tell of it."""
        ...

    async def ask(self, method: Literal["bring", "load"], asked: ModelAnswer) -> Card | Failed:
        """Has one of them do something about a model."""
        ...

    async def everywhere(self, method: Everywhere, *arguments: Any) -> Sequence[Any]:
        """The answers of all that answer; those that are lost are left out."""
        ...

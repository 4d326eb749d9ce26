"""The engine's requests, their events and endings, and the protocol of the pipelines that run them."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Protocol

from PIL import Image

from img2img_server.errors import InvalidField, ServerError
from img2img_server.support.fidelity import EXACT, Fidelity
from img2img_server.support.model_fields import ModelFields
from img2img_server.support.source_rule import SourceRule

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Mask:
    """Which part of a source to redraw.

    `image` is gray (mode L), of the result's size: white is redrawn, black is kept. `digest` identifies its content; empty if it
    need not be cached. With `paste` the result has the source's pixels where the mask is black, and a blend of both where it is
    gray.
    """

    image: Image.Image
    digest: bytes = b""
    paste: bool = True


@dataclass(frozen=True, slots=True)
class LoraUse:
    """A LoRA of a request: its id, its scale, and the SHA-256 of its file when the request arrived."""

    id: str
    scale: float
    digest: str


@dataclass(frozen=True, slots=True)
class ControlUse:
    """A control image of a request, and the ControlNet that reads it.

    `model` is the ControlNet's id, and `digest` its bundle's; both are empty if the request's model has a built-in control input.
    `image` is RGB, of the result's size; `image_digest` identifies its content. The residuals are multiplied by `scale` in steps
    that begin at `start` of the request's steps or later, and finish by `end`, both from 0 to 1; in other steps there are none.
    `mode` is the kind of the image, for unions only.
    """

    model: str
    image: Image.Image
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    digest: str = ""
    image_digest: bytes = b""
    mode: int | None = None


@dataclass(frozen=True, slots=True)
class ImagePromptUse:
    """An image prompt of a request: images, and the image adapter (IP-Adapter) that reads them.

    `adapter` is the adapter's id, and `digest` the SHA-256 of its file when the request arrived. `encoder` is the id of its image
    encoder, and `encoder_digest` the digest of that one's bundle. `images` are the RGB squares of the encoder's size that it
    reads; `image_digests` identify their content. The effect is multiplied by `scale`.
    """

    adapter: str
    images: tuple[Image.Image, ...]
    scale: float = 1.0
    digest: str = ""
    encoder: str = ""
    encoder_digest: str = ""
    image_digests: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One transform, checked and with every default filled in.

    `image` is RGB, prepared by the pipeline's `source_rule`. `size` is the result's, None if that is the image's. There is one
    seed per image of the result. `negative_prompt` is None if none was given, which SDXL distinguishes from an empty one.
    `deadline` is a time of the engine's clock in seconds, None for none. `scheduler` is one of the pipeline's `schedulers`, None
    for the bundle's default. A preview is drawn every `preview_interval` steps, none at 0. `image_digest` identifies the image's
    content; empty if it need not be cached. A `background` request is the server's own and has the lowest priority. `client`
    names its client; `id` identifies it in logs and to the caller. Without `follow` only its ending is delivered, so a replica
    sends no other events. Requests of one `cache_scope` share cached encodings, so their timings reveal whether another request
    used the same input. `mask` is None if the whole source is transformed; the pipeline's `source_rule` says whether it takes
    one. `references` are more images to edit by, in RGB, and `reference_digests` identify their content. `loras` are added to the
    model's weights for this request only. `fidelity` says how near the images must be to those of full steps. The ControlNets of
    `controls` and the image encoders of `image_prompts` stay in memory while the request runs.

    Fields that the model does not take have values without effect: `strength` and `guidance_scale` 1, `true_cfg_scale` None.
    """

    model: str
    image: Image.Image
    prompt: str
    negative_prompt: str | None
    strength: float
    num_inference_steps: int
    guidance_scale: float
    seeds: tuple[int, ...]
    deadline: float | None = None
    scheduler: str | None = None
    preview_interval: int = 0
    image_digest: bytes = b""
    background: bool = False
    client: str = ""
    id: str = ""
    follow: bool = True
    cache_scope: str = ""
    size: tuple[int, int] | None = None
    mask: Mask | None = None
    true_cfg_scale: float | None = None
    references: tuple[Image.Image, ...] = ()
    reference_digests: tuple[bytes, ...] = ()
    loras: tuple[LoraUse, ...] = ()
    fidelity: Fidelity = EXACT
    controls: tuple[ControlUse, ...] = ()
    image_prompts: tuple[ImagePromptUse, ...] = ()

    @property
    def result_size(self) -> tuple[int, int]:
        """Width and height of the images to make, in pixels."""
        return self.size or self.image.size


def companions_of(request: Request) -> tuple[str, ...]:
    """The ids of the models that a request uses besides its own: ControlNets and image encoders."""
    nets = (control.model for control in request.controls if control.model)
    return (*nets, *(prompt.encoder for prompt in request.image_prompts))


def no_step(request: Request) -> InvalidField:
    """The error for a strength that leaves none of the request's steps to run."""
    return InvalidField(
        "strength",
        f"strength {request.strength:g} times {request.num_inference_steps} steps is less than one step: increase one of them",
    )


@dataclass(frozen=True, slots=True)
class RequestWarning:
    """Something in a request that its caller may not have intended: the `field` of TransformRequest, a `description` for people
    and a stable `code` for programs."""

    field: str
    description: str
    code: str


@dataclass(frozen=True, slots=True, eq=False)
class StepCall:
    """A request's part in the call of one step: `rows` rows of `shape`, each as much work as `pixels` pixels in a full step."""

    shape: Hashable
    pixels: int
    rows: int


@dataclass(frozen=True, slots=True)
class UsedSpeedup:
    """The speedup that a request runs with: its name, how many times less work the request is, and the worst PSNR (in decibels)
    and SSIM that were measured with it."""

    name: str
    times_faster: float
    psnr_db: float
    ssim: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The device work of a request, known before anything is computed.

    Requests of one model with the same `shape` share calls; `rows` is the number of samples it adds to each: one per image, two
    with classifier-free guidance. `step_count` is the number of calls it takes part in. `warnings` are sent to its caller with
    the result. With a `speedup`, `calls` has its part in the call of each step, as they differ. A step takes about `work` times
    as long as without the request's controls.
    """

    shape: Hashable
    pixels: int
    rows: int
    step_count: int
    warnings: tuple[RequestWarning, ...] = ()
    calls: tuple[StepCall, ...] = ()
    speedup: UsedSpeedup | None = None
    work: float = 1.0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that a request spent waiting, being encoded, between its first step and its last, and being decoded."""

    queue: float
    encode: float
    denoise: float
    decode: float


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits behind `position` others. It will be finished in about `eta` seconds, None if unknown."""

    position: int
    eta: float | None


@dataclass(frozen=True, slots=True)
class Started:
    """The request was admitted and prepared. It will take `step_count` steps."""

    step_count: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Step `step` of `step_count` is done; the request will be finished in about `eta` seconds, None if unknown.

    `preview` is a small RGB image of the current state, at the steps for which the request asked for one.
    """

    step: int
    step_count: int
    eta: float | None = None
    preview: Image.Image | None = None


@dataclass(frozen=True, slots=True)
class Completed:
    """The ending of a successful request: one RGB image per seed, and its plan's warnings and speedup."""

    images: tuple[Image.Image, ...]
    timings: Timings
    warnings: tuple[RequestWarning, ...] = ()
    speedup: UsedSpeedup | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The ending of a failed, expired or cancelled request."""

    error: ServerError


Ending = Completed | Failed
Event = Queued | Started | Progress | Ending


class State(Protocol):
    """A pipeline's state of a request between two steps."""

    @property
    def step(self) -> int:
        """Steps done."""
        ...

    @property
    def step_count(self) -> int:
        """Total steps."""
        ...


class Pipeline(Protocol):
    """A model, split into the stages that the engine schedules.

    All methods except `plan` are called on the engine's thread only. Methods of several requests or states return one result for
    each, in order; if one raises, no state has changed and the engine calls it for each alone. Errors: a ServerError says what is
    wrong with the request (InvalidField) and reaches the caller; any other exception is a failure of the model.
    """

    engine: str
    """The runtime and device, such as "onnx:cpu"."""
    size_multiple: int
    """Width and height of images are multiples of this many pixels."""
    native_size: tuple[int, int]
    """Width and height of the model's training images, in pixels."""
    source_rule: SourceRule
    """How the source image is prepared before it is in a request."""
    max_rows: int | None
    """Maximum rows of one call of `denoise`, None for no limit of its own."""
    measurable: bool
    """Whether repeated calls of `denoise` with the same states compute again, so that warm-up can measure it."""
    row_buckets: Sequence[int]
    """The ascending row counts that calls of `denoise` are padded to and recorded for; calls of more rows than the last are
    split. Empty if calls are not padded."""
    schedulers: tuple[str, ...]
    """Supported values of a request's `scheduler`."""
    fields: ModelFields
    """The fields of TransformRequest that it takes, of those that not every model takes. `scheduler` is not among them."""

    def plan(self, request: Request) -> Plan:
        """Plans `request`. Raises InvalidField if the pipeline does not support it."""
        ...

    def prepare(self, requests: Sequence[Request]) -> Sequence[State]:
        """Encodes prompts and images, and creates noised latents, schedulers and random generators."""
        ...

    def denoise(self, states: Sequence[Any]) -> Sequence[Any]:
        """Predicts the noise of each state in one call of the model. All have one shape. May be repeated."""
        ...

    def advance(self, states: Sequence[Any], noises: Sequence[Any]) -> None:
        """Advances each state one step by its predicted noise, and increments its `step`.

        If this raises, the states whose `step` has not changed are the failed ones.
        """
        ...

    def mark(self) -> Callable[[], None] | None:
        """A function that waits until the device has finished all work submitted so far by `prepare`, `denoise` and `advance`,
        and raises its errors. None if these methods are synchronous."""
        ...

    def preview(self, states: Sequence[Any]) -> Sequence[Image.Image | None]:
        """A small RGB preview of each state, None if the pipeline does not support previews."""
        ...

    def finish(self, states: Sequence[Any]) -> Sequence[Sequence[Image.Image]]:
        """Decodes the latents of finished states of one shape: an RGB image per seed."""
        ...

    def release(self, state: Any) -> None:
        """Frees a state's resources outside of Python's memory. Called once for each state, whatever its request's ending."""
        ...

    def close(self) -> None:
        """Frees the pipeline's resources when its model is unloaded or replaced. Called once, from any thread."""
        ...


Listener = Callable[[Event], None]


class RequestStatus(Enum):
    """The lifecycle of an accepted request. It only moves forward, and every request reaches ENDED."""

    WAITING = auto()
    """In the queue. Nothing was computed for it yet."""
    ACTIVE = auto()
    """Takes part in calls of its model, and may hold device memory."""
    LEAVING = auto()
    """Takes part in no further calls. Its device memory is being released; its ending was not delivered yet."""
    ENDED = auto()
    """Its ending was delivered."""


@dataclass(slots=True, eq=False)
class Ticket:
    """An accepted request, which ends exactly once.

    The engine's thread calls `listener` for each event, holding `lock`; any thread may cancel the request. The scheduler moves
    `status` up to LEAVING, `end` to ENDED. `state` is the pipeline's, None before the request is prepared and after it is
    released. Times are of the engine's clock, in seconds.
    """

    request: Request
    plan: Plan
    listener: Listener
    number: int
    arrival: float
    status: RequestStatus = RequestStatus.WAITING
    state: State | None = None
    started: float = 0.0
    prepared: float = 0.0
    passed_over: int = 0
    """Calls of the model since it last took part in one."""
    forecast: float | None = None
    """The seconds it takes if no other request arrives, forecast on arrival."""
    forecast_key: Hashable = None
    """Groups requests with similar forecast errors."""
    expected: float | None = None
    """When it is expected to be finished, corrected for requests that may still arrive."""
    position: int = 0
    """The last position that its caller was notified of."""
    cancelled: bool = False
    """Whether the caller has cancelled it."""
    cancellations: "deque[Ticket]" = field(default_factory=deque)
    """Where the request is noted if it is cancelled: the scheduler's."""
    slotted: bool = False
    """Whether a slot counts against its client's limit for it (admission.py)."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while the listener is called, because another thread may end the request."""
    kind: Hashable = field(init=False)
    """The key of requests that take equal parts in equally many calls."""

    def __post_init__(self) -> None:
        plan = self.plan
        self.kind = (self.group, plan.rows, plan.step_count, plan.work, plan.speedup)

    @property
    def ended(self) -> bool:
        """Whether its ending was delivered."""
        return self.status is RequestStatus.ENDED

    @property
    def steps_left(self) -> int:
        """The number of calls of the model that it will still take part in."""
        return self.plan.step_count if self.state is None else self.state.step_count - self.state.step

    @property
    def group(self) -> tuple[str, Hashable]:
        """Model and shape: what requests must have in common to be encoded or decoded together."""
        return self.request.model, self.plan.shape

    @property
    def step(self) -> int:
        """The steps done."""
        return 0 if self.state is None else self.state.step

    @property
    def next_call(self) -> Plan | StepCall:
        """Its part in the call of its next step, or of the last one if there is none left."""
        calls = self.plan.calls
        return calls[min(self.step, len(calls) - 1)] if calls else self.plan

    def cancel(self) -> None:
        """Cancels the request: it leaves the batch at the next step. Idempotent."""
        if not self.cancelled:
            self.cancelled = True
            if not self.ended:
                self.cancellations.append(self)

    def notify(self, event: Queued | Started | Progress) -> None:
        """Calls the listener with a progress event. Dropped after the ending."""
        with self.lock:
            if not self.ended:
                self.listener(event)

    def end(self, ending: Ending) -> None:
        """Delivers the ending. A second one is a bug of the engine."""
        with self.lock:
            assert not self.ended, f"request {self.number} ended twice"
            self.status = RequestStatus.ENDED
            try:
                self.listener(ending)
            except Exception:  # noqa: BLE001 - a failing listener must not affect other requests or the engine
                _log.exception("failed to deliver the ending of a request", extra={"request_id": self.request.id})


def run_alone(pipeline: Pipeline, request: Request) -> Sequence[Image.Image]:
    """Runs `request` from start to end on the calling thread. Returns one image per seed."""
    (state,) = pipeline.prepare([request])
    try:
        while state.step < state.step_count:
            pipeline.advance([state], pipeline.denoise([state]))
        (images,) = pipeline.finish([state])
        return images
    finally:
        pipeline.release(state)

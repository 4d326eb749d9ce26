"""What goes through the engine: requests, their events and endings, and the protocol of a pipeline that runs them."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Protocol

from PIL import Image

from img2img_server.errors import ServerError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """One transform, checked and with every default filled in.

    `image` is RGB and already has the size of the result. There is one seed for each image to make. `negative_prompt` is
    None if none was given, which SDXL distinguishes from an empty one. `deadline` is a time of the engine's clock in seconds,
    None for none. `scheduler` is one of the pipeline's `schedulers`, None for the bundle's own. A preview is drawn every
    `preview_interval` steps, none at 0. `image_digest` identifies the image's content; empty if it need not be cached. A
    `background` request is the server's own, and has the lowest priority. `client` is whose it is, and `id` identifies it in logs
    and to the caller. Without `follow` only its ending is delivered, so a replica sends no other events. Requests of one
    `cache_scope` share cached encodings, so their timings reveal whether another request used the same input.
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


@dataclass(frozen=True, slots=True)
class RequestWarning:
    """Something about a request that its caller may not have meant: the `field` of TransformRequest that it is about, a
    `description` for people and a stable `code` for programs."""

    field: str
    description: str
    code: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request will ask of the device, known before anything is computed.

    Requests of one model with the same `shape` share calls; `rows` is how many samples it adds to each: one for each
    image, two with classifier-free guidance. `step_count` is how many calls it takes part in. `warnings` go to its caller with
    its good end.
    """

    shape: Hashable
    pixels: int
    rows: int
    step_count: int
    warnings: tuple[RequestWarning, ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that a request spent waiting, being encoded, between its first step and its last, and being decoded."""

    queue: float
    encode: float
    denoise: float
    decode: float


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits: `position` requests come before it. It will be finished in about `eta` seconds, None if unknown."""

    position: int
    eta: float | None


@dataclass(frozen=True, slots=True)
class Started:
    """The request was admitted and prepared. It will take `step_count` steps."""

    step_count: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Step `step` of `step_count` is done; in about `eta` seconds it will be finished, None where unknown.

    `preview` is the image so far, a small RGB one, at the steps where the request asked for it.
    """

    step: int
    step_count: int
    eta: float | None = None
    preview: Image.Image | None = None


@dataclass(frozen=True, slots=True)
class Completed:
    """The request's good end: one RGB image for each seed, and its plan's warnings."""

    images: tuple[Image.Image, ...]
    timings: Timings
    warnings: tuple[RequestWarning, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """The request's other end: an error, an expiry or a cancellation."""

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
        """Steps in all."""
        ...


class Pipeline(Protocol):
    """A model, split into the parts that the engine schedules.

    Every method is called by the engine's thread only, but `plan`, which any thread may call. Those that take several requests or
    states give one result for each, in order; if one raises, nothing has changed and the engine asks for each alone.
    Errors: a ServerError says what is wrong with the request (InvalidField) and reaches the caller; any other exception is
    the model's failure.
    """

    engine: str
    """What runs it, such as "onnx:cpu"."""
    size_multiple: int
    """Width and height of images are multiples of this many pixels."""
    native_size: tuple[int, int]
    """Width and height of the images that it was trained on, in pixels."""
    max_rows: int | None
    """The most rows that one call of `denoise` takes, None for no limit of its own."""
    measurable: bool
    """Whether `denoise` computes again when it is asked again of the same states, so that it can be timed before it is served."""
    row_buckets: Sequence[int]
    """The rows that calls of `denoise` are padded to and recorded for, in order; more than the last are made in parts. Empty if
    calls are not padded."""
    schedulers: tuple[str, ...]
    """The names that a request's `scheduler` may have."""

    def plan(self, request: Request) -> Plan:
        """What `request` will cost. Raises InvalidField where the pipeline cannot do it."""
        ...

    def prepare(self, requests: Sequence[Request]) -> Sequence[State]:
        """Encodes prompts and images, and makes the noised latents, the schedules and the random generators."""
        ...

    def denoise(self, states: Sequence[Any]) -> Sequence[Any]:
        """Predicts the noise of each state, in one call of the model. All are of one shape. Changes none of them."""
        ...

    def advance(self, states: Sequence[Any], noises: Sequence[Any]) -> None:
        """Takes each state one step on by its predicted noise; afterwards its `step` is one more.

        If it raises, the states whose `step` has not changed are the ones that failed.
        """
        ...

    def mark(self) -> Callable[[], None] | None:
        """What waits until the device has done all that `prepare`, `denoise` and `advance` have asked of it so far, and raises
        what it could not do; None if they wait themselves."""
        ...

    def preview(self, states: Sequence[Any]) -> Sequence[Image.Image | None]:
        """A small RGB image of what each state is about to become, None where the pipeline can draw none."""
        ...

    def finish(self, states: Sequence[Any]) -> Sequence[Sequence[Image.Image]]:
        """Decodes the latents of states of one shape whose steps are all done: an RGB image for each seed."""
        ...

    def release(self, state: Any) -> None:
        """Frees what a state holds outside of Python's memory. Called once for each state, however its request ended."""
        ...

    def close(self) -> None:
        """Gives up what others keep for it: its model is being unloaded, or run by another. Called once, from any thread."""
        ...


Listener = Callable[[Event], None]


class RequestStatus(Enum):
    """Where an accepted request is in its life. It only moves forward, and every request gets to ENDED."""

    WAITING = auto()
    """In the queue. Nothing was computed for it yet."""
    ACTIVE = auto()
    """Takes part in calls of its model, and may hold device memory."""
    LEAVING = auto()
    """Takes part in no further call. Its device memory is being released, and its ending was not delivered yet."""
    ENDED = auto()
    """Its ending was delivered."""


@dataclass(slots=True, eq=False)
class Ticket:
    """An accepted request on its way to its one ending.

    The engine's thread drives it and calls `listener` for each event, under its `lock`; any thread may cancel it. The scheduler
    moves `status` up to LEAVING, `end` to ENDED. `state` is the pipeline's, None before the request was prepared and after it
    was released. Times are of the engine's clock, in seconds.
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
    """The seconds it would take if no other request came, as forecast on arrival."""
    forecast_key: Hashable = None
    """Groups requests with similar forecast errors."""
    expected: float | None = None
    """When it is expected to be finished, corrected for requests that may still arrive."""
    position: int = 0
    """The last position that its caller was notified of."""
    cancelled: bool = False
    """Whether the caller gave up."""
    cancellations: "deque[Ticket]" = field(default_factory=deque)
    """Where the request is noted if it is cancelled: the scheduler's."""
    slotted: bool = False
    """Whether a slot counts against its client's limit for it (admission.py)."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while the listener is called, because another thread may end the request."""

    @property
    def ended(self) -> bool:
        """Whether its ending was delivered."""
        return self.status is RequestStatus.ENDED

    @property
    def steps_left(self) -> int:
        """How many more calls of the model it takes part in."""
        return self.plan.step_count if self.state is None else self.state.step_count - self.state.step

    @property
    def group(self) -> tuple[str, Hashable]:
        """Model and shape: what requests must have in common to share a call."""
        return self.request.model, self.plan.shape

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
    """Runs `request` from start to end on the calling thread: one image for each of its seeds."""
    (state,) = pipeline.prepare([request])
    try:
        while state.step < state.step_count:
            pipeline.advance([state], pipeline.denoise([state]))
        (images,) = pipeline.finish([state])
        return images
    finally:
        pipeline.release(state)

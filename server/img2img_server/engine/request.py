"""What goes through the engine: requests, their events and endings, and the protocol of a pipeline that runs them."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from img2img_server.errors import ServerError


@dataclass(frozen=True, slots=True)
class Request:
    """One transform, checked and with every default filled in.

    `image` is RGB and already has the size of the result. There is one seed for each picture to make. `negative_prompt` is
    None where none was given, which SDXL tells from an empty one. `deadline` is a time of the engine's clock in seconds,
    None for none.
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


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that a request spent waiting, being encoded, between its first step and its last, and being decoded."""

    queue: float
    encode: float
    denoise: float
    decode: float


@dataclass(frozen=True, slots=True)
class Started:
    """The request's first turn came."""

    step_count: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Step `step` of `step_count` is done."""

    step: int
    step_count: int


@dataclass(frozen=True, slots=True)
class Completed:
    """The request's good end: one RGB picture for each seed."""

    images: tuple[Image.Image, ...]
    timings: Timings


@dataclass(frozen=True, slots=True)
class Failed:
    """The request's other end: an error, an expiry or a cancellation."""

    error: ServerError


Ending = Completed | Failed
Event = Started | Progress | Ending


class State(Protocol):
    """What a pipeline keeps of a request between two steps.

    States with the same `shape` (of one pipeline) share a call of `denoise`; `rows` is how many pictures it adds to it.
    """

    @property
    def shape(self) -> Hashable:
        """What a batch must have in common."""
        ...

    @property
    def rows(self) -> int:
        """Pictures."""
        ...

    @property
    def step(self) -> int:
        """Steps done."""
        ...

    @property
    def step_count(self) -> int:
        """Steps in all."""
        ...


class Pipeline(Protocol):
    """A model, split into the parts that the engine schedules. Every method is called by the engine's thread only.

    Errors: a ServerError says what is wrong with the request (InvalidField) and reaches the caller; any other exception is
    the model's failure.
    """

    engine: str
    """What runs it, such as "onnx:cpu"."""
    size_multiple: int
    """Width and height of pictures are multiples of this many pixels."""
    max_rows: int | None
    """The most rows that one call of `denoise` takes, None for no limit of its own."""

    def prepare(self, request: Request) -> State:
        """Encodes the prompt and the picture, and makes the noised latents, the schedule and the random generators."""
        ...

    def denoise(self, states: Sequence[Any]) -> Sequence[Any]:
        """Predicts the noise of each state, in one call of the model. All states have the same shape."""
        ...

    def advance(self, state: Any, noise: Any) -> None:
        """Takes the state one step on by its predicted noise; afterwards `state.step` is one more."""
        ...

    def finish(self, state: Any) -> Sequence[Image.Image]:
        """Decodes the latents of a state whose steps are all done: one RGB picture for each seed."""
        ...

    def release(self, state: Any) -> None:
        """Frees what a state holds outside of Python's memory. Called once for each state, however its request ended."""
        ...


Listener = Callable[[Event], None]


@dataclass(slots=True, eq=False)
class Ticket:
    """An accepted request on its way to its one ending.

    The engine's thread drives it and calls `listener` for each event; any thread may cancel it. Times are of the engine's
    clock, in seconds.
    """

    request: Request
    listener: Listener
    number: int
    arrival: float
    state: State | None = None
    started: float = 0.0
    prepared: float = 0.0
    served: int = 0
    """When it last had a turn, counted in turns of all."""
    cancelled: bool = False
    """Whether the caller gave up."""
    ended: bool = False
    """Whether its ending was delivered."""

    def cancel(self) -> None:
        """Gives up: the request leaves the batch at the next step. Harmless on one that has ended."""
        self.cancelled = True

    def tell(self, event: Started | Progress) -> None:
        """Tells the listener how it goes. Nothing is told after the ending."""
        if not self.ended:
            self.listener(event)

    def end(self, ending: Ending) -> None:
        """Delivers the ending. A second one is a bug of the engine."""
        assert not self.ended, f"request {self.number} ended twice"
        self.ended = True
        self.listener(ending)

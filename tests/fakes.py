"""A pipeline without a model, a clock that is set by hand, and a listener that remembers."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Event, Failed, Progress, Request, Ticket
from img2img_server.engine.scheduler import Limits
from PIL import Image


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(slots=True, eq=False)
class FakeState:
    request: Request
    step_count: int
    step: int = 0

    @property
    def shape(self) -> Hashable:
        return self.request.image.size

    @property
    def rows(self) -> int:
        return len(self.request.seeds)


class FakePipeline:
    """Counts steps in place of denoising. Each call takes `seconds` of `clock`, and a prompt can ask for trouble:
    "fail prepare", "fail denoise", "fail advance", "fail finish", "fail release"."""

    engine = "fake:cpu"
    size_multiple = 8

    def __init__(self, clock: Clock | None = None, seconds: float = 1.0, max_rows: int | None = None) -> None:
        self.max_rows = max_rows
        self.batches: list[list[FakeState]] = []
        self.released: list[FakeState] = []
        self.prepared: list[FakeState] = []
        self.before_call: Callable[[], object] = lambda: None
        self._clock, self._seconds = clock or Clock(), seconds

    def prepare(self, request: Request) -> FakeState:
        _trouble(request, "prepare")
        state = FakeState(request, int(request.num_inference_steps * request.strength))
        self.prepared.append(state)
        return state

    def denoise(self, states: Sequence[FakeState]) -> Sequence[int]:
        self.before_call()
        assert len({state.shape for state in states}) == 1, "a batch has one shape"
        self.batches.append(list(states))
        self._clock.now += self._seconds
        for state in states:
            _trouble(state.request, "denoise")
        return [1] * len(states)

    def advance(self, state: FakeState, noise: int) -> None:
        _trouble(state.request, "advance")
        state.step += noise

    def finish(self, state: FakeState) -> Sequence[Image.Image]:
        assert state.step == state.step_count, "only what is denoised is decoded"
        _trouble(state.request, "finish")
        return [state.request.image] * state.rows

    def release(self, state: FakeState) -> None:
        self.released.append(state)
        _trouble(state.request, "release")


@dataclass(slots=True)
class Caller:
    """Submits one request and remembers what it is told."""

    engine: Engine
    events: list[Event] = field(default_factory=list)
    ticket: Ticket | None = None

    def submit(self, **settings: object) -> "Caller":
        self.ticket = self.engine.submit(make_request(**settings), self.events.append).ticket
        return self

    @property
    def endings(self) -> list[Event]:
        return [event for event in self.events if isinstance(event, Completed | Failed)]

    @property
    def steps(self) -> list[int]:
        return [event.step for event in self.events if isinstance(event, Progress)]

    @property
    def error(self) -> Exception | None:
        (ending,) = self.endings
        return ending.error if isinstance(ending, Failed) else None


def make_request(**settings: object) -> Request:
    values: dict[str, object] = {
        "model": "m",
        "image": Image.new("RGB", (8, 8)),
        "prompt": "",
        "negative_prompt": None,
        "strength": 1.0,
        "num_inference_steps": 4,
        "guidance_scale": 7.5,
        "seeds": (0,),
    }
    return Request(**{**values, **settings})  # type: ignore[arg-type]


def make_engine(limits: Limits | None = None, max_rows: int | None = None) -> tuple[Engine, FakePipeline, Clock]:
    """An engine that is stepped by hand, on a fake pipeline "m" whose calls take a second."""
    clock = Clock()
    pipeline = FakePipeline(clock, max_rows=max_rows)
    return Engine({"m": pipeline}, limits, clock), pipeline, clock


def run_out(engine: Engine, most: int = 1000) -> int:
    """Steps the engine until nothing is left. Returns how many steps that took."""
    for count in range(1, most + 1):
        if not engine.step():
            return count
    raise AssertionError(f"the engine still has work after {most} steps")


def _trouble(request: Request, where: str) -> None:
    if f"fail {where}" in request.prompt:
        raise RuntimeError(f"told to fail in {where}")

"""A pipeline without a model, a manual clock, and a listener that records events."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from img2img_server.engine.engine import Engine
from img2img_server.engine.request import (
    Completed,
    Event,
    Failed,
    Plan,
    Progress,
    Request,
    RequestWarning,
    Ticket,
    UsedSpeedup,
    no_step,
)
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.errors import OutOfMemory
from img2img_server.support.model_fields import GUIDED, ModelFields
from img2img_server.support.source_rule import SourceRule
from PIL import Image


class Clock:
    """A manual clock: `now` is its time in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(slots=True, eq=False)
class FakeState:
    request: Request
    step_count: int
    step: int = 0


class FakePipeline:
    """Counts steps instead of denoising. A call of n rows takes `seconds(n)` of `clock`; encoding and decoding take no time by
    default. A prompt can inject failures: "fail prepare", "fail denoise", "fail advance", "fail preview", "fail finish", "fail
    release". `before` maps a stage to a function that is called when a call of it begins. Calls of more than `memory` pixels, if
    set, raise OutOfMemory; "full denoise" and the like always do."""

    engine = "fake:cpu"
    size_multiple = 8
    native_size = (16, 16)
    source_rule = SourceRule()
    fields: ModelFields = GUIDED
    measurable = True
    row_buckets: Sequence[int] = ()
    schedulers: tuple[str, ...] = ("EulerDiscreteScheduler", "DDIMScheduler")

    def __init__(
        self,
        clock: Clock | None = None,
        seconds: Callable[[int], float] = lambda rows: 1.0,
        max_rows: int | None = None,
        codec_seconds: float = 0.0,
    ) -> None:
        self.max_rows = max_rows
        self.batches: list[list[FakeState]] = []
        self.prepared: list[FakeState] = []
        self.encoded: list[int] = []
        self.decoded: list[int] = []
        self.previewed: list[FakeState] = []
        self.released: list[FakeState] = []
        self.before_call: Callable[[], object] = lambda: None
        self.before: dict[str, Callable[[], object]] = {}
        self.memory: int | None = None
        self.closed = False
        self.warnings: tuple[RequestWarning, ...] = ()
        self.speedup: UsedSpeedup | None = None
        self.refused: list[tuple[str, int]] = []
        self._clock, self._seconds, self._codec_seconds = clock or Clock(), seconds, codec_seconds

    def plan(self, request: Request) -> Plan:
        steps = int(request.num_inference_steps * request.strength)
        if steps == 0:
            raise no_step(request)
        width, height = request.result_size
        used = None if request.fidelity.is_exact else self.speedup
        return Plan((width, height), width * height, len(request.seeds), steps, self.warnings, speedup=used)

    def prepare(self, requests: Sequence[Request]) -> Sequence[FakeState]:
        self.before.get("prepare", _nothing)()
        self._clock.now += self._codec_seconds * len(requests)
        self._allocate("prepare", requests, [1] * len(requests))
        for request in requests:
            _trouble(request, "prepare")
        states = [FakeState(request, self.plan(request).step_count) for request in requests]
        self.encoded.append(len(requests))
        self.prepared += states
        return states

    def denoise(self, states: Sequence[FakeState]) -> Sequence[int]:
        self.before.get("denoise", _nothing)()
        self.before_call()
        assert len({state.request.image.size for state in states}) == 1, "a batch has one shape"
        self._allocate("denoise", [state.request for state in states], [len(state.request.seeds) for state in states])
        for state in states:
            assert state not in self.released, "what was released is not denoised"
            _trouble(state.request, "denoise")
        self.batches.append(list(states))
        self._clock.now += self._seconds(sum(len(state.request.seeds) for state in states))
        return [1] * len(states)

    def advance(self, states: Sequence[FakeState], noises: Sequence[int]) -> None:
        self.before.get("advance", _nothing)()
        for state, noise in zip(states, noises, strict=True):
            _trouble(state.request, "advance")
            state.step += noise

    def mark(self) -> Callable[[], None] | None:
        return None

    def preview(self, states: Sequence[FakeState]) -> Sequence[Image.Image | None]:
        for state in states:
            _trouble(state.request, "preview")
        self.previewed += states
        return [state.request.image.resize((4, 4)) for state in states]

    def finish(self, states: Sequence[FakeState]) -> Sequence[Sequence[Image.Image]]:
        self.before.get("finish", _nothing)()
        self._clock.now += self._codec_seconds * len(states)
        self._allocate("finish", [state.request for state in states], [len(state.request.seeds) for state in states])
        for state in states:
            assert state.step == state.step_count, "only what is denoised is decoded"
            _trouble(state.request, "finish")
        self.decoded.append(len(states))
        return [[state.request.image] * len(state.request.seeds) for state in states]

    def release(self, state: FakeState) -> None:
        assert state not in self.released, "a state is released once"
        self.released.append(state)
        _trouble(state.request, "release")

    def close(self) -> None:
        self.closed = True

    def _allocate(self, where: str, requests: Sequence[Request], rows: Sequence[int]) -> None:
        """Raises OutOfMemory and records the call if its rows exceed the memory."""
        pixels = sum(count * self.plan(request).pixels for request, count in zip(requests, rows, strict=True))
        too_much = self.memory is not None and pixels > self.memory
        if too_much or any(f"full {where}" in request.prompt for request in requests):
            self.refused.append((where, sum(rows)))
            raise OutOfMemory("the fake ran out of memory")


@dataclass(slots=True)
class Caller:
    """Submits one request and records its events."""

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


def make_engine(
    limits: QueueLimits | None = None,
    max_rows: int | None = None,
    seconds: Callable[[int], float] = lambda rows: 1.0,
    codec_seconds: float = 0.0,
) -> tuple[Engine, FakePipeline, Clock]:
    """An engine that tests step, on a fake pipeline "m" whose calls take one second for any number of rows."""
    clock = Clock()
    pipeline = FakePipeline(clock, seconds, max_rows, codec_seconds)
    return Engine({"m": pipeline}, limits, clock), pipeline, clock


def run_out(engine: Engine, most: int = 1000) -> int:
    """Steps the engine until it is idle. Returns the number of steps."""
    for count in range(1, most + 1):
        if not engine.step():
            return count
    raise AssertionError(f"the engine still has work after {most} steps")


def _nothing() -> None:
    pass


def _trouble(request: Request, where: str) -> None:
    if f"fail {where}" in request.prompt:
        raise RuntimeError(f"told to fail in {where}")

"""An asynchronous device: the next step is submitted before the previous one is waited for and reported."""

import threading
from collections.abc import Callable, Sequence

import pytest
from fakes import Clock, FakePipeline, FakeState, make_request
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Event, Failed, Progress, Started, Ticket
from img2img_server.errors import ModelFailed, OutOfMemory, RequestCancelled
from PIL import Image

ASKING, STEP = 0.01, 1.0
"""Seconds that it takes to ask for a call, and that the device takes for it."""


class Device(FakePipeline):
    """A pipeline whose calls are asynchronous: the device runs them in order, each in `STEP` seconds of the clock. `log` has the
    submitted calls, waits and events, in order."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock, lambda rows: ASKING)
        self.log: list[str] = []
        self.fails: set[int] = set()
        """The numbers of the calls of `denoise` that the device cannot do."""
        self.free = 0.0
        """When it will have done all that was asked."""
        self._asked, self._number, self._waited = 0, 0, 0

    @property
    def most_in_flight(self) -> int:
        """The most steps that were asked for and not waited for."""
        flying = most = 0
        for line in self.log:
            flying += line.startswith("denoise")
            flying -= line.startswith("wait for denoise")
            most = max(most, flying)
        return most

    def prepare(self, requests: Sequence[object]) -> Sequence[FakeState]:
        states = super().prepare(requests)  # type: ignore[arg-type]
        self._ask(f"prepare {len(requests)}")
        return states

    def denoise(self, states: Sequence[FakeState]) -> Sequence[int]:
        noises = super().denoise(states)
        self._number += 1
        self._ask(f"denoise {self._number}")
        return noises

    def advance(self, states: Sequence[FakeState], noises: Sequence[int]) -> None:
        super().advance(states, noises)
        self.log.append("advance")

    def mark(self) -> Callable[[], None]:
        what, done, number = self.log[-1], self.free, self._number

        def wait() -> None:
            self._clock.now = max(self._clock.now, done)
            self.log.append(f"wait for {what}")
            if what.startswith("denoise") and number in self.fails:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

        return wait

    def preview(self, states: Sequence[FakeState]) -> Sequence[Image.Image | None]:
        self.log.append("preview")
        return super().preview(states)

    def finish(self, states: Sequence[FakeState]) -> Sequence[Sequence[Image.Image]]:
        self.log.append("finish")
        return super().finish(states)

    def release(self, state: FakeState) -> None:
        self.log.append("release")
        super().release(state)

    def _ask(self, what: str) -> None:
        self.free = max(self.free, self._clock.now) + STEP
        self.log.append(what)


class Hearing:
    """A caller whose events go to the device's log, too."""

    def __init__(self, engine: Engine, device: Device, model: str = "m", **settings: object) -> None:
        self.events: list[Event] = []
        self._device = device
        self.ticket: Ticket = engine.submit(make_request(model=model, **settings), self._listen).ticket

    def _listen(self, event: Event) -> None:
        self.events.append(event)
        self._device.log.append(f"told {event.step}" if isinstance(event, Progress) else f"told {type(event).__name__}")

    @property
    def ending(self) -> Event:
        return self.events[-1]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def device(clock: Clock) -> Device:
    return Device(clock)


@pytest.fixture
def engine(clock: Clock, device: Device) -> Engine:
    return Engine({"m": device}, clock=lambda: clock.now)


def run(engine: Engine) -> None:
    while engine.step():
        pass


def test_next_step_is_submitted_before_waiting_for_the_previous(engine: Engine, device: Device) -> None:
    Hearing(engine, device, num_inference_steps=3)
    run(engine)
    assert device.log == [
        "prepare 1",
        "denoise 1",
        "wait for prepare 1",
        "told Started",
        "advance",
        "denoise 2",
        "wait for denoise 1",
        "told 1",
        "advance",
        "denoise 3",
        "wait for denoise 2",
        "told 2",
        "advance",
        "wait for denoise 3",
        "told 3",
        "finish",
        "release",
        "told Completed",
    ]


def test_at_most_two_steps_are_in_flight(engine: Engine, device: Device) -> None:
    callers = [Hearing(engine, device, num_inference_steps=steps, seeds=(steps,)) for steps in (2, 9, 5, 7)]
    run(engine)
    assert device.most_in_flight == 2
    for caller, steps in zip(callers, (2, 9, 5, 7), strict=True):
        assert [event.step for event in caller.events if isinstance(event, Progress)] == list(range(1, steps + 1))
        assert isinstance(caller.events[0], Started)
        assert isinstance(caller.ending, Completed)


def test_preview_is_drawn_only_after_its_step_has_finished(engine: Engine, device: Device) -> None:
    caller = Hearing(engine, device, num_inference_steps=4, preview_interval=2)
    run(engine)
    at = device.log.index("preview")
    assert device.log[at - 1] == "wait for denoise 2"
    assert device.log[at + 1] == "told 2"
    seen = [event.step for event in caller.events if isinstance(event, Progress) and event.preview is not None]
    assert seen == [2]


def test_step_duration_is_device_time_not_submission_time(engine: Engine, device: Device) -> None:
    Hearing(engine, device, num_inference_steps=20)
    run(engine)
    seconds = engine.costs.seconds("denoise", ("m", (8, 8)), 64, 1)
    assert seconds == pytest.approx(STEP, rel=0.05)
    assert engine.costs.seconds("prepare", ("m", (8, 8)), 64, 1) == pytest.approx(STEP, rel=0.05)


def test_failed_step_fails_only_its_own_requests(clock: Clock) -> None:
    broken, well = Device(clock), Device(clock)
    engine = Engine({"m": broken, "other": well}, clock=lambda: clock.now)
    broken.fails = {2}
    bad = Hearing(engine, broken, num_inference_steps=5)
    good = Hearing(engine, well, model="other", num_inference_steps=5)
    run(engine)
    assert isinstance(bad.ending, Failed)
    assert isinstance(bad.ending.error, ModelFailed)
    assert [event.step for event in bad.events if isinstance(event, Progress)] == [1]
    assert isinstance(good.ending, Completed)
    assert (len(broken.released), len(well.released)) == (1, 1)
    assert isinstance(Hearing(engine, broken, num_inference_steps=1).ticket, Ticket)
    run(engine)
    assert len(broken.released) == 2, "it goes on"


def test_cancelled_request_is_released_after_its_step_in_flight(engine: Engine, device: Device) -> None:
    caller = Hearing(engine, device, num_inference_steps=9)
    engine.step()
    engine.step()
    caller.ticket.cancel()
    run(engine)
    assert isinstance(caller.ending, Failed)
    assert isinstance(caller.ending.error, RequestCancelled)
    assert device.log[-4:] == ["wait for denoise 2", "told 2", "release", "told Failed"]


def test_out_of_memory_halves_the_batch_while_a_step_is_in_flight(engine: Engine, device: Device) -> None:
    callers = [Hearing(engine, device, num_inference_steps=4, seeds=(seed,)) for seed in range(4)]
    engine.step()
    device.memory = 2 * 64
    run(engine)
    assert [type(caller.ending) for caller in callers] == [Completed] * 4
    assert device.refused == [("denoise", 4)]
    assert max(len(batch) for batch in device.batches[1:]) == 2


def test_out_of_memory_fails_one_request_and_the_step_in_flight_is_delivered(engine: Engine, device: Device) -> None:
    caller = Hearing(engine, device, num_inference_steps=4)
    engine.step()
    device.memory = 1
    run(engine)
    assert isinstance(caller.ending, Failed)
    assert isinstance(caller.ending.error, OutOfMemory)
    assert device.log[-1] != "denoise 2"
    assert sum(line.startswith("wait") for line in device.log) == sum(
        line.startswith(("prepare", "denoise")) for line in device.log
    )


def test_engine_call_runs_with_no_step_in_flight(engine: Engine, device: Device) -> None:
    ended = threading.Event()
    seen: list[str] = []

    def look() -> None:
        flying = sum(line.startswith("denoise") for line in device.log) - sum("for denoise" in line for line in device.log)
        seen.append(f"{flying} in flight")

    engine.submit(make_request(num_inference_steps=50), lambda event: ended.set() if isinstance(event, Completed) else None)
    engine.start()
    for _ in range(5):
        engine.call("m", look)
    assert ended.wait(60)
    engine.close()
    assert seen == ["0 in flight"] * 5


def test_hanging_wait_counts_as_a_running_model_call(clock: Clock) -> None:
    hangs, go, ended = threading.Event(), threading.Event(), threading.Event()

    class Hanging(Device):
        def mark(self) -> Callable[[], None]:
            wait, what = super().mark(), self.log[-1]

            def hang() -> None:
                if what == "denoise 2":
                    hangs.set()
                    assert go.wait(60)
                wait()

            return hang

    engine = Engine({"m": Hanging(clock)}, clock=lambda: clock.now)
    engine.submit(make_request(num_inference_steps=3), lambda event: ended.set() if isinstance(event, Completed) else None)
    engine.start()
    assert hangs.wait(60)
    clock.now += 100.0
    call = engine.current_call
    assert call is not None
    assert (call.stage, call.model) == ("denoise", "m")
    assert call.seconds >= 100.0
    go.set()
    assert ended.wait(60)
    engine.close()

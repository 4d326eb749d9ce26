"""A pipeline on a manual clock, for benchmarks of the engine without a device: it advances the clock instead of computing."""

from collections.abc import Sequence
from dataclasses import dataclass

from img2img_server.engine.request import Plan, Request
from img2img_server.support.model_fields import GUIDED
from img2img_server.support.source_rule import STRETCHED
from PIL import Image

IMAGE = Image.new("RGB", (8, 8))


@dataclass(slots=True, eq=False)
class ManualState:
    """A request's steps and rows."""

    step_count: int
    rows: int
    step: int = 0


class ManualDevice:
    """Implements the engine's Pipeline: counts steps. Subclasses have `plan` and `denoise`, and advance `now`, in seconds."""

    engine = "simulated:manual"
    size_multiple = 8
    native_size = (512, 512)
    source_rule = STRETCHED
    fields = GUIDED
    max_rows: int | None = None
    measurable = True
    row_buckets: Sequence[int] = ()
    schedulers: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        """The time in seconds."""
        return self.now

    def plan(self, request: Request) -> Plan:
        """The request's shape, rows and steps."""
        raise NotImplementedError

    def prepare(self, requests: Sequence[Request]) -> Sequence[ManualState]:
        """States before their first step."""
        plans = [self.plan(request) for request in requests]
        return [ManualState(plan.step_count, plan.rows) for plan in plans]

    def denoise(self, states: Sequence[ManualState]) -> Sequence[None]:
        """One call of the denoiser."""
        raise NotImplementedError

    def advance(self, states: Sequence[ManualState], noises: Sequence[None]) -> None:
        """Counts a step."""
        for state in states:
            state.step += 1

    def mark(self) -> None:
        """The host never waits for this device."""

    def preview(self, states: Sequence[ManualState]) -> Sequence[None]:
        """Draws no previews."""
        return [None] * len(states)

    def finish(self, states: Sequence[ManualState]) -> Sequence[Sequence[Image.Image]]:
        """The same image for each request."""
        return [[IMAGE]] * len(states)

    def release(self, state: ManualState) -> None:
        """States hold no memory of a device."""

    def close(self) -> None:
        """Holds nothing."""

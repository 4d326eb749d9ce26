"""A simulated device whose calls only sleep, to test and measure everything else.

A sleep uses no core, so two cores suffice to measure how a server with several devices scales.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from img2img_server.backends.local import LocalBackend
from img2img_server.bundle.manifest import Manifest, Source, Verification
from img2img_server.config import ServerConfig
from img2img_server.engine.request import Plan, Request
from img2img_server.models.registry import Model, ModelRegistry
from img2img_server.support.model_fields import GUIDED
from img2img_server.support.source_rule import STRETCHED
from PIL import Image, ImageChops


@dataclass(slots=True, eq=False)
class _State:
    request: Request
    step_count: int
    step: int = 0


class SimulatedDevice:
    """Implements the engine's Pipeline. A denoising call takes `seconds`, plus `more` for each further row.

    The image is the source, shifted and offset by a number that depends on seed, step count and prompt: equal on two replicas,
    different for other seeds.
    """

    engine = "simulated:sleep"
    size_multiple = 8
    native_size = (512, 512)
    source_rule = STRETCHED
    fields = GUIDED
    max_rows: int | None = None
    measurable = True
    row_buckets: Sequence[int] = ()
    schedulers: tuple[str, ...] = ()

    def __init__(self, seconds: float, more: float = 0.0) -> None:
        self._seconds, self._more = seconds, more

    def plan(self, request: Request) -> Plan:
        """One row for each image; the number of steps of diffusers."""
        width, height = request.image.size
        steps = max(1, int(request.num_inference_steps * request.strength))
        return Plan((width, height), width * height, len(request.seeds), steps)

    def prepare(self, requests: Sequence[Request]) -> Sequence[_State]:
        """Returns the states."""
        return [_State(request, self.plan(request).step_count) for request in requests]

    def denoise(self, states: Sequence[_State]) -> Sequence[None]:
        """Sleeps for the duration of a call."""
        rows = sum(len(state.request.seeds) for state in states)
        time.sleep(self._seconds + self._more * (rows - 1))
        return [None] * len(states)

    def advance(self, states: Sequence[_State], noises: Sequence[None]) -> None:
        """Counts steps."""
        for state in states:
            state.step += 1

    def mark(self) -> None:
        """Does nothing."""

    def preview(self, states: Sequence[_State]) -> Sequence[Image.Image | None]:
        """Returns no previews."""
        return [None] * len(states)

    def finish(self, states: Sequence[_State]) -> Sequence[Sequence[Image.Image]]:
        """Returns the images."""
        return [[_drawn(state.request, seed) for seed in state.request.seeds] for state in states]

    def release(self, state: _State) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def _drawn(request: Request, seed: int) -> Image.Image:
    shift = (seed * 31 + request.num_inference_steps * 7 + sum(request.prompt.encode())) % 256
    return ImageChops.offset(request.image, shift % request.image.width, 0).point(lambda value: (value + shift) % 256)


def simulated(config: ServerConfig, seconds: float, more: float = 0.0, models: tuple[str, ...] = ("m",)) -> LocalBackend:
    """A backend with these models on simulated devices; the first is the default."""

    def load() -> ModelRegistry:
        return ModelRegistry([Model(name, _manifest(name), SimulatedDevice(seconds, more)) for name in models], default=models[0])

    return LocalBackend(config, load)


def _manifest(name: str) -> Manifest:
    return Manifest(
        source=Source(repo_id=f"simulated/{name}", revision="r1"),
        pipeline_class="StableDiffusionImg2ImgPipeline",
        family="stable-diffusion",
        backend="onnx",
        components=(),
        files={},
        tools={},
        verification=Verification(passed=True),
    )


SOMEWHERE = Path()
"""A placeholder for `ServerConfig.models`, which is not read."""

"""`img2img serve` with fake models: the same command, without heavy imports.

Flags, bundles with their checksums, engine, watchdog, assets and exit statuses are the real ones. Only the loading of a pipeline
is replaced, by a fake pipeline with a fixed time per step, whose images are computed by `expected`.

    PYTHONPATH=benchmarks python -m soak_parts.stand_in --models DIR --port 0 ...
"""

import hashlib
import os
import sys
import threading
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from img2img_server.bundle.manifest import Component, Manifest, Source, Verification, digest_files, list_files, write_manifest
from img2img_server.engine.request import Plan, Request
from img2img_server.support.model_fields import GUIDED, FieldRule, ModelFields
from img2img_server.support.source_rule import STRETCHED
from PIL import Image, ImageChops

STEP_SECONDS = "STAND_IN_STEP"
"""The environment variable with the seconds of a step; each row adds a tenth of that."""
FLAW = "STAND_IN_FLAW"
"""The environment variable that makes every n-th image wrong, to test that wrong images are detected."""
_BALLAST = 8 * 2**20
"""Memory in bytes of a loaded fake, so that loading and unloading can be measured."""


def plant(store: Path, name: str) -> Path:
    """Makes a bundle without a real model in the folder `store`, with a manifest and checksums."""
    bundle = store / name
    (bundle / "unet").mkdir(parents=True)
    (bundle / "model_index.json").write_text('{"_class_name": "StableDiffusionImg2ImgPipeline"}\n')
    (bundle / "unet" / "model.onnx").write_bytes(hashlib.shake_256(name.encode()).digest(2**16))
    manifest = Manifest(
        source=Source(repo_id=f"acme/{name}", revision="r1"),
        pipeline_class="StableDiffusionImg2ImgPipeline",
        family="stable-diffusion",
        backend="onnx",
        components=(Component("unet", "fp32", bytes=2**16),),
        files=digest_files(bundle, list_files(bundle)),
        tools={},
        verification=Verification(passed=True),
    )
    write_manifest(bundle, manifest)
    return bundle


def expected(image: Image.Image, prompt: str, seed: int, steps: int) -> Image.Image:
    """The image of a fake pipeline: the source plus a pattern that depends on prompt, seed and steps (modulo 256)."""
    pattern = hashlib.shake_256(f"{prompt}\0{seed}\0{steps}".encode()).digest(3 * 64)
    tile = Image.frombytes("RGB", (8, 8), pattern)
    canvas = Image.new("RGB", image.size)
    for left in range(0, image.width, 8):
        for top in range(0, image.height, 8):
            canvas.paste(tile, (left, top))
    return ImageChops.add_modulo(image, canvas)


@dataclass(slots=True, eq=False)
class StandInState:
    """A request in progress and its completed steps."""

    request: Request
    step_count: int
    step: int = 0


class StandInPipeline:
    """Sleeps instead of denoising. A prompt can cause faults by stage: "raise denoise", "hang finish" and so on."""

    engine = "stand-in:cpu"
    size_multiple = 8
    native_size = (64, 64)
    source_rule = STRETCHED
    fields: ModelFields = {**GUIDED, "reference_images": FieldRule()}
    max_rows: int | None = None
    measurable = True
    row_buckets: Sequence[int] = ()
    schedulers: tuple[str, ...] = ("EulerDiscreteScheduler", "DDIMScheduler")

    def __init__(self, seconds: float, flaw: int = 0) -> None:
        self._seconds = seconds
        self._flaw = flaw
        self._made = 0
        self._ballast = bytearray(os.urandom(16) * (_BALLAST // 16))

    def plan(self, request: Request) -> Plan:
        """Rows and steps like those of a real pipeline."""
        width, height = request.image.size
        rows = len(request.seeds) * (2 if request.guidance_scale > 1 else 1)
        return Plan((width, height), width * height, rows, int(request.num_inference_steps * request.strength))

    def prepare(self, requests: Sequence[Request]) -> Sequence[StandInState]:
        """One state per request."""
        self._trouble("prepare", requests)
        return [StandInState(request, self.plan(request).step_count) for request in requests]

    def denoise(self, states: Sequence[StandInState]) -> Sequence[int]:
        """Sleeps for the time of a step."""
        self._trouble("denoise", [state.request for state in states])
        time.sleep(self._seconds * (1 + 0.1 * sum(self.plan(state.request).rows for state in states)))
        return [1] * len(states)

    def advance(self, states: Sequence[StandInState], noises: Sequence[int]) -> None:
        """Counts the step."""
        self._trouble("advance", [state.request for state in states])
        for state, noise in zip(states, noises, strict=True):
            state.step += noise

    def mark(self) -> None:
        """Does nothing: the stand-in has no device."""

    def preview(self, states: Sequence[StandInState]) -> Sequence[Image.Image | None]:
        """The source at 8 x 8."""
        return [state.request.image.resize((8, 8)) for state in states]

    def finish(self, states: Sequence[StandInState]) -> Sequence[Sequence[Image.Image]]:
        """The images of `expected`."""
        self._trouble("finish", [state.request for state in states])
        return [[self._draw(state.request, seed) for seed in state.request.seeds] for state in states]

    def _draw(self, request: Request, seed: int) -> Image.Image:
        self._made += 1
        flawed = self._flaw and self._made % self._flaw == 0
        return expected(request.image, request.prompt, seed + bool(flawed), request.num_inference_steps)

    def release(self, state: StandInState) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""

    def _trouble(self, stage: str, requests: Sequence[Request]) -> None:
        for request in requests:
            if f"raise {stage}" in request.prompt:
                raise RuntimeError(f"a planned failure at /planted/path in {stage}")
            if f"hang {stage}" in request.prompt:
                threading.Event().wait()


def _load_pipeline(*arguments: Any, **settings: Any) -> StandInPipeline:
    return StandInPipeline(float(os.environ.get(STEP_SECONDS, "0.01")), int(os.environ.get(FLAW, "0")))


class _RunnerCache:
    def keep(self, *arguments: Any) -> None:
        """Does nothing: no other engine is built."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **settings: None


def main(words: Sequence[str]) -> int:
    """Runs `img2img serve` with `words`. Returns its exit status."""
    loader = types.ModuleType("img2img_server.runtime.loader")
    candidate = types.ModuleType("img2img_server.runtime.tensorrt.candidate")
    vars(loader).update(load_pipeline=_load_pipeline)
    vars(candidate).update(RunnerCache=_RunnerCache, candidates=lambda *arguments: ())
    sys.modules |= {loader.__name__: loader, candidate.__name__: candidate}
    from img2img_cli.__main__ import main as run

    return run(["serve", *words])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

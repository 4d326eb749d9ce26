"""Measures speedups: draws requests in full and with each setting of a grid by the server's pipeline, and compares the images."""

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from img2img_server.bundle.speedups import Speedup, Speedups
from img2img_server.config import DEFAULT_GUIDANCE, DEFAULT_STEPS
from img2img_server.engine.request import Request, run_alone
from img2img_server.runtime.diffusion.stepped import SteppedPipeline
from img2img_server.support.fidelity import Fidelity
from PIL import Image

from img2img_export.progress import Progress
from img2img_export.verify.images import measure, sample_image

_FULL_SHARES = (0.2, 0.4, 0.6)
_PERIODS = (2, 3, 5)
_SKIPPED = ((0.2, 3), (0.2, 2), (0.4, 2), (0.6, 3), (0.6, 2))
"""Called shares and skip periods: alone, and with _WITH_SKIPPED."""
_WITH_SKIPPED = (0.2, 2)
"""The full share and the period that are combined with skipped calls."""
_LEAST_PSNR_DB = 25.0
"""Images that differ more are of no use: such a setting is given up at its first image below."""
_LEAST_TIMES = 1.05
_MOST = 8
"""The largest number of settings in a manifest."""
_ANY = Fidelity(level=None, min_psnr_db=0.0)
_FLAWLESS = 999.0

_PROMPTS = (
    "A beautiful landscape with mountains and a lake at sunset",
    "An old fisherman with a white beard, oil on canvas",
    "A city street at night in the rain, neon signs",
)
_STRENGTHS = (0.6, 0.8)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A reference request, an image of it, and the seconds of CPU time that it took."""

    request: Request
    image: Image.Image
    seconds: float


def measure_speedups(pipeline: SteppedPipeline, light_cost: float, progress: Progress, timed: bool = True) -> Speedups:
    """The speedups of a pipeline, the fastest first. `light_cost` is that of a row of its light graph. Seconds are not measured
    unless `timed`."""
    progress.stage("drawing images in full, to compare speedups with")
    drawn = _references(pipeline)
    first = drawn[0].request
    known = Speedups((), len(drawn), first.num_inference_steps, first.guidance_scale, light_cost)
    found: list[Speedup] = []
    candidates = list(_grid(pipeline, is_guided=pipeline.plan(first).rows > 1))
    for number, candidate in enumerate(candidates, start=1):
        progress.stage(f"speedup {number} of {len(candidates)}: {candidate.name}")
        if (result := _measure(pipeline, candidate, known, drawn, timed)) is not None:
            found.append(result)
    return replace(known, table=_best(found))


def _references(pipeline: SteppedPipeline) -> list[_Drawn]:
    """For each prompt an image from noise alone, and changes of it by the next prompt, as sources are mostly images like those
    that the model was trained on."""
    width, height = pipeline.native_size
    side = max(pipeline.size_multiple, min(width, height, 256) // pipeline.size_multiple * pipeline.size_multiple)
    steps = pipeline.fields["num_inference_steps"].default if "num_inference_steps" in pipeline.fields else None
    guidance = pipeline.fields["guidance_scale"].default if "guidance_scale" in pipeline.fields else 1.0
    base = Request(
        model="",
        image=sample_image(side, side),
        prompt="",
        negative_prompt=None,
        strength=1.0,
        num_inference_steps=int(steps or DEFAULT_STEPS),
        guidance_scale=DEFAULT_GUIDANCE if guidance is None else guidance,
        seeds=(0,),
    )
    drawn = []
    for number, prompt in enumerate(_PROMPTS):
        drawn.append(_draw(pipeline, replace(base, prompt=prompt, seeds=(number,))))
        source, changed = drawn[-1].image, _PROMPTS[(number + 1) % len(_PROMPTS)]
        for strength in _STRENGTHS if "strength" in pipeline.fields else ():
            request = replace(base, image=source, prompt=changed, strength=strength, seeds=(number,))
            drawn.append(_draw(pipeline, request))
    return drawn


def _draw(pipeline: SteppedPipeline, request: Request) -> _Drawn:
    began = time.process_time()  # not delayed by other work on the machine
    (image,) = run_alone(pipeline, request)
    return _Drawn(request, image, time.process_time() - began)


def _grid(pipeline: SteppedPipeline, is_guided: bool) -> Iterator[Speedup]:
    kinds = [(is_guided, pipeline.speedups.has_features)]
    if is_guided and pipeline.speedups.has_features:
        kinds.append((True, False))
    kinds = [kind for kind in kinds if any(kind)]
    for (guidance, features), share, period in itertools.product(kinds, _FULL_SHARES, _PERIODS):
        yield Speedup(_name(guidance, features, share, period), share, period, guidance, features)
    for called, skipped in _SKIPPED:
        fewer = f"predicted image kept in one of {skipped} steps after the first {called:.0%}"
        yield Speedup(fewer, 1.0, 1, False, False, called, skipped)
        for guidance, features in kinds[:1]:
            name = f"{fewer}; {_name(guidance, features, *_WITH_SKIPPED)}"
            yield Speedup(name, *_WITH_SKIPPED, guidance, features, called, skipped)


def _name(guidance: bool, features: bool, share: float, period: int) -> str:
    what = " and ".join(filter(None, ("guidance" * guidance, "features" * features)))
    return f"{what} kept, {share:.0%} of the steps full, then one of {period}"


def _measure(
    pipeline: SteppedPipeline, candidate: Speedup, known: Speedups, drawn: Sequence[_Drawn], timed: bool
) -> Speedup | None:
    """The candidate with its measurements; None if an image differs too much."""
    before = pipeline.speedups.speedups
    # Chosen for any bound, and by the code that serves requests.
    pipeline.speedups.speedups = replace(known, table=(replace(candidate, psnr_db=_FLAWLESS, ssim=1.0),))
    times, seconds, psnr, ssim = [], [], [], []
    try:
        for one in drawn:
            request = replace(one.request, fidelity=_ANY)
            used = pipeline.plan(request).speedup
            if used is None:
                return None
            again = _draw(pipeline, request)
            compared = measure("", again.image, one.image)
            if compared.psnr_db < _LEAST_PSNR_DB:
                return None
            times.append(used.times_faster)
            seconds.append(one.seconds / again.seconds)
            psnr.append(compared.psnr_db)
            ssim.append(compared.ssim)
    finally:
        pipeline.speedups.speedups = before
    return replace(
        candidate,
        times_faster=round(statistics.fmean(times), 3),
        cpu_times_faster=round(statistics.fmean(seconds), 3) if timed else 0.0,
        psnr_db=_rounded_down(min(psnr), 2),
        mean_psnr_db=round(statistics.fmean(psnr), 2),
        ssim=_rounded_down(min(ssim), 4),
        mean_ssim=round(statistics.fmean(ssim), 4),
    )


def _rounded_down(value: float, digits: int) -> float:
    scale = 10.0**digits
    return int(value * scale) / scale


def _best(found: Sequence[Speedup]) -> tuple[Speedup, ...]:
    """The settings that no other setting beats in both speed and PSNR, the fastest first, at most `_MOST`: settings whose
    neighbors have nearly the same PSNR are dropped."""
    best: list[Speedup] = []
    for one in sorted(found, key=lambda one: (-one.times_faster, -one.psnr_db)):
        if one.times_faster >= _LEAST_TIMES and all(one.psnr_db > other.psnr_db for other in best):
            best.append(one)
    while len(best) > _MOST:
        gaps = [best[index + 1].psnr_db - best[index - 1].psnr_db for index in range(1, len(best) - 1)]
        del best[1 + gaps.index(min(gaps))]
    return tuple(best)

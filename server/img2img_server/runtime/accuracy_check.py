"""The gate: does a pipeline that computes otherwise than was verified still draw the bundle's reference images?

An engine that rounds more (bfloat16, TensorRT) is let in by the images that diffusers drew in fp32 when the bundle was made.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from img2img_server.bundle.limits import LEAST_CONTRAST, LIMITS, Precision
from img2img_server.bundle.manifest import Manifest, Reference
from img2img_server.engine.request import Pipeline, Request, run_alone
from img2img_server.errors import BundleError

INFINITE_PSNR = 999.0
"""What stands for the PSNR of equal images, in decibels."""

_MOST = 2
"""Cases that a pipeline is judged by: one prompt at two strengths. More would be a slow start."""


@dataclass(frozen=True, slots=True)
class ReferenceCase:
    """A request, and the RGB image that answers it."""

    name: str
    request: Request
    picture: Image.Image


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a pipeline may be used. `problem` says why not, in a line; `psnr_db` is that of the worst image."""

    passed: bool
    problem: str = ""
    psnr_db: float = INFINITE_PSNR


def cases(manifest: Manifest, bundle: Path, model: str = "") -> tuple[ReferenceCase, ...]:
    """What to judge by, as requests to `model`: none where the bundle has no references. Raises BundleError for damaged files."""
    return tuple(_case(reference, bundle, model) for reference in manifest.references[:_MOST])


def judge(pipeline: Pipeline, bundle: Path, manifest: Manifest, least_psnr_db: float) -> Verdict:
    """Draws each case on the calling thread, and compares. A bundle without references is never passed.

    Raises what the pipeline raises where it does not run.
    """
    known = cases(manifest, bundle)
    if not known:
        return Verdict(False, "the bundle has no reference pictures to judge by: export it again")
    drawn = [run_alone(pipeline, case.request)[0] for case in known]
    return compare(known, drawn, least_psnr_db)


def compare(known: Sequence[ReferenceCase], drawn: Sequence[Image.Image], least_psnr_db: float) -> Verdict:
    """The verdict on an image for each case."""
    worst = INFINITE_PSNR
    for case, picture in zip(known, drawn, strict=True):
        if picture.size != case.picture.size:
            return Verdict(False, f"{case.name}: it draws {picture.size}, the reference has {case.picture.size}", 0.0)
        if float(np.asarray(picture).std()) < LEAST_CONTRAST:
            return Verdict(False, f"{case.name}: it draws one colour only", 0.0)
        worst = min(worst, psnr_db(picture, case.picture))
        if worst < least_psnr_db:
            return Verdict(False, f"{case.name}: PSNR {worst:.1f} dB, the least is {least_psnr_db:.1f}", worst)
    return Verdict(True, "", worst)


def least_psnr_db(precision: Precision) -> float:
    """Decibels that an image drawn in `precision` must keep against the reference: the limit that exports are verified by."""
    return LIMITS[precision].psnr_db


def psnr_db(picture: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio of two RGB images of one size, in decibels; INFINITE_PSNR where they are equal."""
    difference = np.asarray(picture.convert("RGB"), np.float64) - np.asarray(reference.convert("RGB"), np.float64)
    mean_square = float((difference**2).mean())
    return 10 * math.log10(255**2 / mean_square) if mean_square else INFINITE_PSNR


def _case(reference: Reference, bundle: Path, model: str) -> ReferenceCase:
    return ReferenceCase(
        name=reference.case,
        request=Request(
            model=model,
            image=_open(bundle, reference.source),
            prompt=reference.prompt,
            negative_prompt=reference.negative_prompt,
            strength=reference.strength,
            num_inference_steps=reference.num_inference_steps,
            guidance_scale=reference.guidance_scale,
            seeds=(reference.seed,),
        ),
        picture=_open(bundle, reference.picture),
    )


def _open(bundle: Path, name: str) -> Image.Image:
    path = bundle / name
    if not path.resolve().is_relative_to(bundle.resolve()):
        raise BundleError(f"{bundle} names a reference picture outside itself: {name}")
    try:
        with Image.open(path, formats=("PNG",)) as file:
            return file.convert("RGB")
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}") from error

"""The accuracy check: compares a pipeline's images with the bundle's reference images.

A pipeline that computes in lower precision than the export verified (bfloat16, TensorRT) is used only if its images are close
enough to those that diffusers drew in fp32 at export.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from img2img_server.bundle.manifest import LEAST_CONTRAST, Manifest, Precision, Reference, WeightFormat, limits_of
from img2img_server.engine.request import Pipeline, Request, run_alone
from img2img_server.errors import BundleError, ServerError
from img2img_server.runtime.onnx.providers import ERRORS

CANNOT_DRAW = (*ERRORS, BundleError, ServerError, RuntimeError, FloatingPointError)
"""Errors of a pipeline that is loaded or draws which mean that it does not work on this machine."""
INFINITE_PSNR = 999.0
"""The PSNR reported for equal images, in decibels."""

_MOST = 2
"""Maximum number of reference cases per check: one prompt at two strengths. More would slow down the start."""


@dataclass(frozen=True, slots=True)
class ReferenceCase:
    """A request and its reference image, in RGB."""

    name: str
    request: Request
    image: Image.Image


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a pipeline may be used. `problem` is the reason if not, in one line; `psnr_db` is the worst image's PSNR."""

    passed: bool
    problem: str = ""
    psnr_db: float = INFINITE_PSNR


def cases(manifest: Manifest, bundle: Path, model: str = "") -> tuple[ReferenceCase, ...]:
    """The bundle's reference cases as requests to `model`; empty if it has none. Raises BundleError for damaged files."""
    return tuple(_case(reference, bundle, model) for reference in manifest.references[:_MOST])


def judge(pipeline: Pipeline, bundle: Path, manifest: Manifest, least_psnr_db: float) -> Verdict:
    """Draws each case on the calling thread and compares it. A bundle without reference images does not pass.

    Raises the pipeline's own errors.
    """
    known = cases(manifest, bundle)
    if not known:
        return Verdict(False, "the bundle has no reference images to compare with: export it again")
    drawn = [run_alone(pipeline, case.request)[0] for case in known]
    return compare(known, drawn, least_psnr_db)


def compare(known: Sequence[ReferenceCase], drawn: Sequence[Image.Image], least_psnr_db: float) -> Verdict:
    """Compares one image per case, in the order of `known`."""
    worst = INFINITE_PSNR
    for case, image in zip(known, drawn, strict=True):
        if image.size != case.image.size:
            return Verdict(False, f"{case.name}: the image is {image.size}, the reference {case.image.size}", 0.0)
        if float(np.asarray(image).std()) < LEAST_CONTRAST:
            return Verdict(False, f"{case.name}: the image has only one color", 0.0)
        worst = min(worst, psnr_db(image, case.image))
        if worst < least_psnr_db:
            return Verdict(False, f"{case.name}: PSNR {worst:.1f} dB, the minimum is {least_psnr_db:.1f}", worst)
    return Verdict(True, "", worst)


def least_psnr_db(precision: Precision, weight_format: WeightFormat = "") -> float:
    """Minimum PSNR in decibels of an image drawn in `precision` with weights in `weight_format`: the limit of the export's
    verification."""
    return limits_of(precision, weight_format).psnr_db


def psnr_db(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio of two images of equal size, compared in RGB, in decibels; INFINITE_PSNR if they are equal."""
    difference = np.asarray(image.convert("RGB"), np.float64) - np.asarray(reference.convert("RGB"), np.float64)
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
        image=_open(bundle, reference.picture),
    )


def _open(bundle: Path, name: str) -> Image.Image:
    path = bundle / name
    if not path.resolve().is_relative_to(bundle.resolve()):
        raise BundleError(f"{bundle}/manifest.json names a reference image outside the bundle: {name}")
    try:
        with Image.open(path, formats=("PNG",)) as file:
            return file.convert("RGB")
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}") from error

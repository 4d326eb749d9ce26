"""The whole picture: does the server's own pipeline draw what diffusers' AutoPipelineForImage2Image draws with the same seed?"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from img2img_server.bundle import Manifest, PictureParity
from img2img_server.engine.request import Request
from img2img_server.errors import BundleError, ServerError
from PIL import Image

from img2img_export.errors import ExportError, first_line
from img2img_export.graphs import RUNTIME_ERRORS, quiet
from img2img_export.models import WHOLE

GREATEST_DIFFERENCE = 1
"""Steps of 1/255 by which a value may differ: fp32 sums in another order may round to the neighbouring value, no further."""
LEAST_CONTRAST = 2.0
"""Standard deviation, in steps of 1/255, below which a picture is taken for black or constant: what NaNs decode to."""

_GREATEST_SIZE = 256
_INFINITE_PSNR = 999.0
_PROMPT = "A beautiful landscape with mountains and a lake at sunset"
_FAILURES = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, ArithmeticError)


@dataclass(frozen=True, slots=True)
class PictureCase:
    """A request to compare on, by the name that the report gives it."""

    name: str
    request: Request


def picture_cases(pipeline: Any, family: str) -> tuple[PictureCase, ...]:
    """Three short requests at the model's own size, or 256 pixels where that is larger, and one that is not square.

    A pipeline that runs whole is asked for square pictures only: what else it takes is its own affair.
    """
    size = _own_size(pipeline)
    small = size if family == WHOLE else max(size * 5 // 8 // 8 * 8, 40)
    settings = (
        ("guided", (size, size), 0.6, 5, 7.5, "blurry"),
        ("unguided", (size, size), 1.0, 4, 1.0, ""),
        ("other size", (small + 8 if family != WHOLE else size, small), 0.4, 8, 5.0, "noise"),
    )
    return tuple(
        PictureCase(
            f"{name}, {width} x {height}, strength {strength}, {steps} steps",
            Request(
                model="",
                image=sample_picture(width, height),
                prompt=_PROMPT,
                negative_prompt=negative,
                strength=strength,
                num_inference_steps=steps,
                guidance_scale=guidance,
                seeds=(seed,),
            ),
        )
        for seed, (name, (width, height), strength, steps, guidance, negative) in enumerate(settings)
    )


def draw_references(pipeline: Any, cases: Sequence[PictureCase]) -> list[Image.Image]:
    """What diffusers draws. Raises ExportError where the model does not run, or draws nothing but one colour."""
    pictures = []
    for case in cases:
        try:
            with quiet(), torch.no_grad():
                picture = pipeline(**_arguments(pipeline, case.request)).images[0].convert("RGB")
        except _FAILURES as error:
            raise ExportError(f"diffusers itself cannot run it: {type(error).__name__}: {first_line(error)}") from error
        if (contrast := float(np.asarray(picture).std())) < LEAST_CONTRAST:
            raise ExportError(f"diffusers itself draws one colour only (case {case.name}, contrast {contrast:.2f}/255)")
        pictures.append(picture)
    return pictures


def compare_pictures(
    bundle: Path, manifest: Manifest, cases: Sequence[PictureCase], references: Sequence[Image.Image]
) -> tuple[PictureParity, ...]:
    """Draws each case through the server's pipeline on the CPU, and compares it with the reference."""
    from img2img_server.pipelines.alone import run_alone
    from img2img_server.pipelines.loader import load_pipeline

    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    try:
        with quiet():
            pipeline = load_pipeline(bundle, manifest, provider="cpu")
            return tuple(
                measure(case.name, run_alone(pipeline, case.request)[0], reference)
                for case, reference in zip(cases, references, strict=True)
            )
    except (*_FAILURES, *RUNTIME_ERRORS, BundleError, ServerError) as error:
        raise ExportError(f"the server's pipeline cannot run it: {type(error).__name__}: {first_line(error)}") from error
    finally:
        # The server's loader sets both for a process of its own.
        torch.set_num_threads(threads)
        torch.set_grad_enabled(gradients)


def measure(case: str, picture: Image.Image, reference: Image.Image) -> PictureParity:
    """Compares two RGB pictures. Another size never passes, nor does a picture of one colour."""
    if picture.size != reference.size:
        return PictureParity(case, 255, 0.0, False)
    actual, expected = np.asarray(picture, np.int16), np.asarray(reference, np.int16)
    difference = np.abs(actual - expected)
    mean_square = float((difference.astype(np.float64) ** 2).mean())
    psnr = 10 * math.log10(255**2 / mean_square) if mean_square else _INFINITE_PSNR
    worst = int(difference.max())
    return PictureParity(case, worst, psnr, worst <= GREATEST_DIFFERENCE and float(actual.std()) >= LEAST_CONTRAST)


def sample_picture(width: int, height: int) -> Image.Image:
    """An RGB picture with smooth shades, edges and fine detail, made by a formula."""
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    hills = (y > 0.55 + 0.15 * np.sin(7 * x)).astype(float)
    red = 0.9 - 0.6 * y + 0.1 * np.sin(60 * x)
    green = 0.3 + 0.5 * hills * x
    blue = (1 - hills) * (0.4 + 0.5 * y) + 0.1
    pixels = np.stack([red, green, blue], axis=-1).clip(0, 1) * 255
    return Image.fromarray(pixels.round().astype(np.uint8))


def _own_size(pipeline: Any) -> int:
    """Pixels of a side: a multiple of 64, from the UNet's or transformer's own latent size."""
    model = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    latents = getattr(model.config, "sample_size", None) if model is not None else None
    pixels = latents * 8 if isinstance(latents, int) else _GREATEST_SIZE
    return max(min(pixels, _GREATEST_SIZE) // 64 * 64, 64)


def _arguments(pipeline: Any, request: Request) -> dict[str, Any]:
    """The request as arguments of this pipeline's call: those that it has."""
    offered = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "image": request.image,
        "strength": request.strength,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "width": request.image.width,
        "height": request.image.height,
        "generator": torch.Generator("cpu").manual_seed(request.seeds[0]),
    }
    known = inspect.signature(pipeline.__call__).parameters
    return {name: value for name, value in offered.items() if name in known}

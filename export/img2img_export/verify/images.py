"""Compares final images of the server's pipeline with those of diffusers' AutoPipelineForImage2Image for the same seeds."""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from img2img_server.bundle.manifest import LEAST_CONTRAST, ImageParity, Manifest, Precision, WeightFormat, limits_of
from img2img_server.engine.request import Request
from img2img_server.errors import BundleError, ServerError
from img2img_server.runtime.accuracy_check import psnr_db
from img2img_server.runtime.common.pipe import latent_size
from img2img_server.runtime.common.sources import source_rule
from img2img_server.runtime.control.own import with_control
from img2img_server.runtime.diffusion.masking import default_mask
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps

from img2img_export.convert.graphs import RUNTIME_ERRORS, quiet
from img2img_export.convert.models import WHOLE
from img2img_export.errors import ExportError, first_line
from img2img_export.report import decibels, verdict

_GREATEST_SIZE = 256
_LEAST_SIZE = 40
_FAILURES = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, ArithmeticError)
_SSIM_WINDOW = 7
"""Window side in pixels, as in the SSIM paper and skimage."""


@dataclass(frozen=True, slots=True)
class ImageCase:
    """A request to compare, with its name in the report."""

    name: str
    request: Request


@dataclass(frozen=True, slots=True)
class _Subject:
    """A prompt with its parameters: `steps` are the inference steps for each of STRENGTHS. A guidance scale of 1 is off."""

    prompt: str
    negative_prompt: str
    guidance_scale: float
    steps: tuple[int, int]
    is_small: bool = False


_CALIBRATION = (
    _Subject("A red bicycle leaning against a white wall, photograph", "low quality", 7.5, (6, 6)),
    _Subject("A portrait of a young woman with a hat, watercolor", "", 1.0, (6, 6)),
    _Subject("Snow on a dark forest, minimalist drawing", "colorful, sunny", 10.0, (6, 6)),
    _Subject("", "", 3.0, (6, 6)),
)
"""Further requests, whose calls extend the ranges of a static quantization."""

STRENGTHS = (0.5, 1.0)
"""Half of the steps, from the source's latents; and all of them, from noise alone."""

_SUBJECTS = (
    _Subject("A beautiful landscape with mountains and a lake at sunset", "blurry", 7.5, (4, 4)),
    _Subject("An old fisherman with a white beard, oil on canvas", "", 1.0, (6, 4)),
    _Subject("A city street at night in the rain, neon signs", "noise, text", 5.0, (8, 4), is_small=True),
)


def image_cases(pipeline: Any, family: str) -> tuple[ImageCase, ...]:
    """Six short requests: three prompts at two strengths each, at the model's native size (at most 256 pixels) and another size.

    The other size is smaller and not square, except for an opaque pipeline that takes sizes. A pipeline without strength has
    three requests.
    """
    size = _own_size(pipeline)
    step = _size_step(pipeline)
    small = max(size * 5 // 8 // step * step, _LEAST_SIZE // step * step)
    small_size = (small + step, small)
    if family == WHOLE:
        # An opaque pipeline may restrict sizes; all known ones accept a multiple of 64.
        other = size // 128 * 64 or 2 * size
        # One that makes every image with about as many pixels looks at another aspect ratio as at another size.
        small_size = (2 * other if source_rule(pipeline).area is not None else other, other)
    known = "strength" in inspect.signature(pipeline.__call__).parameters
    return tuple(
        _case(subject, small_size if subject.is_small else (size, size), index, seed=2 * number + index, known=known)
        for number, subject in enumerate(_SUBJECTS)
        for index in range(len(STRENGTHS) if known else 1)
    )


def calibration_cases(pipeline: Any, family: str) -> tuple[ImageCase, ...]:
    """Requests with other prompts, guidance scales, seeds and sources than `image_cases`, at the first one's size."""
    first = image_cases(pipeline, family)[0].request
    known = "strength" in inspect.signature(pipeline.__call__).parameters
    cases = []
    for number, (subject, source) in enumerate(zip(_CALIBRATION, _sources(first.image), strict=True)):
        case = _case(subject, first.image.size, number % 2, seed=100 + number, known=known)
        cases.append(replace(case, request=replace(case.request, image=source)))
    return tuple(cases)


def _sources(image: Image.Image) -> tuple[Image.Image, ...]:
    """Images that differ from `image` in colors, contrast and detail."""
    noise = np.random.default_rng(0).integers(0, 256, (image.height // 4 + 1, image.width // 4 + 1, 3), np.uint8)
    dark = image.point(lambda value: value // 4)
    return ImageChops.invert(image), ImageOps.grayscale(image).convert("RGB"), dark, Image.fromarray(noise).resize(image.size)


def _case(subject: _Subject, size: tuple[int, int], index: int, seed: int, known: bool) -> ImageCase:
    strength, steps = STRENGTHS[index], subject.steps[index]
    words = " ".join(subject.prompt.replace(",", "").split()[:3])
    strong = f", strength {strength}" if known else ""
    request = Request(
        model="",
        image=sample_image(*size),
        prompt=subject.prompt,
        negative_prompt=subject.negative_prompt,
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=subject.guidance_scale,
        seeds=(seed,),
    )
    return ImageCase(f"{words}, {size[0]} x {size[1]}{strong}, {steps} steps", request)


def make_references(pipeline: Any, cases: Sequence[ImageCase]) -> list[Image.Image]:
    """Generates the references with diffusers. Raises ExportError if the model does not run, or an image has only one colour."""
    images = []
    for case in cases:
        try:
            with quiet(), torch.no_grad():
                image = pipeline(**_arguments(pipeline, case.request)).images[0].convert("RGB")
        except _FAILURES as error:
            raise ExportError(f"diffusers cannot run the model: {type(error).__name__}: {first_line(error)}") from error
        if (contrast := float(np.asarray(image).std())) < LEAST_CONTRAST:
            raise ExportError(f"diffusers generates an image of one colour (case {case.name}, contrast {contrast:.2f}/255)")
        images.append(image)
    return images


def compare_images(
    bundle: Path, manifest: Manifest, cases: Sequence[ImageCase], references: Sequence[Image.Image], precision: Precision
) -> tuple[tuple[ImageParity, ...], list[Image.Image]]:
    """Runs each case through the server's pipeline on the CPU, and compares the image with its reference."""
    from img2img_server.engine.request import run_alone

    with loaded(bundle, manifest, precision) as pipeline:
        images = [run_alone(pipeline, case.request)[0] for case in cases]
    compared = zip(cases, images, references, strict=True)
    narrow = manifest.weight_format
    return tuple(measure(case.name, image, reference, precision, narrow) for case, image, reference in compared), images


@contextlib.contextmanager
def loaded(bundle: Path, manifest: Manifest, precision: Precision) -> Iterator[Any]:
    """The server's pipeline of the bundle, on the CPU. Graphs in half precision are emulated as on a GPU (emulation.py).

    Failures within the block become ExportErrors.
    """
    from img2img_server.runtime.execution import Execution
    from img2img_server.runtime.loader import load_pipeline
    from img2img_server.runtime.onnx.sessions import SessionOptions, open_session

    from img2img_export.convert.emulation import open_emulated

    def open_graph(path: Path, options: SessionOptions) -> Any:
        # Products with quantized weights compute in another way if these are not prepacked.
        lean = not manifest.weight_format
        return open_emulated(path) if precision in ("fp16", "bf16") else open_session(path, replace(options, lean=lean))

    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    try:
        with quiet():
            yield load_pipeline(bundle, manifest, Execution("cpu"), open_graph=open_graph)
    except (*_FAILURES, *RUNTIME_ERRORS, BundleError, ServerError) as error:
        raise ExportError(f"the server's pipeline cannot run the model: {type(error).__name__}: {first_line(error)}") from error
    finally:
        # The server's loader changes both for the whole process.
        torch.set_num_threads(threads)
        torch.set_grad_enabled(gradients)


def measure(
    case: str, image: Image.Image, reference: Image.Image, precision: Precision = "fp32", weight_format: WeightFormat = ""
) -> ImageParity:
    """Compares two RGB images. A different size fails, and so does an image of one colour (which NaNs decode to)."""
    if image.size != reference.size:
        return ImageParity(case, 255, 0.0, False, ssim=0.0)
    limits = limits_of(precision, weight_format)
    actual, expected = np.asarray(image.convert("RGB")), np.asarray(reference.convert("RGB"))
    difference = np.abs(actual.astype(np.int16) - expected.astype(np.int16))
    psnr = psnr_db(image, reference)
    ssim = _structural_similarity(actual, expected)
    worst = int(difference.max())
    alike = worst <= limits.max_abs_error and psnr >= limits.psnr_db and ssim >= limits.ssim
    return ImageParity(case, worst, psnr, alike and float(actual.std()) >= LEAST_CONTRAST, ssim)


def _structural_similarity(actual: np.ndarray, expected: np.ndarray) -> float:
    """The SSIM of Wang et al. (2004), averaged over the colour channels."""
    from skimage.metrics import structural_similarity

    side = min(*actual.shape[:2], _SSIM_WINDOW)
    window = side if side % 2 else side - 1
    value = structural_similarity(actual, expected, channel_axis=2, data_range=255, win_size=window)  # type: ignore[no-untyped-call]
    return float(value)


def sample_image(width: int, height: int) -> Image.Image:
    """A synthetic RGB image with gradients, edges and fine detail."""
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    hills = (y > 0.55 + 0.15 * np.sin(7 * x)).astype(float)
    red = 0.9 - 0.6 * y + 0.1 * np.sin(60 * x)
    green = 0.3 + 0.5 * hills * x
    blue = (1 - hills) * (0.4 + 0.5 * y) + 0.1
    pixels = np.stack([red, green, blue], axis=-1).clip(0, 1) * 255
    return Image.fromarray(pixels.round().astype(np.uint8))


def _own_size(pipeline: Any) -> int:
    """The native image side in pixels: a multiple of 64, from the latent size of the UNet or transformer."""
    model = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    latents = latent_size(getattr(model.config, "sample_size", None)) if model is not None else None
    pixels = max(latents) * 8 if latents is not None else _GREATEST_SIZE
    return max(min(pixels, _GREATEST_SIZE) // 64 * 64, 64)


def _size_step(pipeline: Any) -> int:
    """The pixel multiple of width and height: that of a latent, or of a transformer's 2 x 2 patch."""
    patch = 2 if getattr(pipeline, "transformer", None) is not None else 1
    return max(int(getattr(pipeline, "vae_scale_factor", 8)), 8) * patch


def _arguments(pipeline: Any, request: Request) -> dict[str, Any]:
    """The request as arguments of the pipeline's call, without those it does not have."""
    (control,) = with_control(request).controls
    offered: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "image": request.image,
        "mask_image": default_mask(request.image.size).image,
        "control_image": control.image,
        "controlnet_conditioning_scale": control.scale,
        "strength": request.strength,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "width": request.image.width,
        "height": request.image.height,
        "generator": torch.Generator("cpu").manual_seed(request.seeds[0]),
        "max_area": request.image.width * request.image.height,
    }
    if request.num_inference_steps != 2:
        offered["intermediate_timesteps"] = None  # SANA-Sprint takes its default at two steps only
    known = inspect.signature(pipeline.__call__).parameters
    return {name: value for name, value in offered.items() if name in known}


AMPLIFICATION = 16
"""Factor that makes differences visible: 16/255 is white."""
GREATEST_SIDE = 256
"""Maximum pixels of an image's longer side on the sheet; larger ones are downscaled."""

_COLUMNS = ("source", "diffusers", "this bundle", f"difference x {AMPLIFICATION}")
_LEAST_COLUMN = 128
"""Minimum column width in pixels, so that captions, which span all columns, fit."""
_MARGIN = 12
_LINE = 18
_FONT_SIZE = 13
_PAPER, _INK, _GOOD, _BAD = "#ffffff", "#202020", "#1a7f37", "#cf222e"


def make_sheet(
    cases: Sequence[ImageCase],
    references: Sequence[Image.Image],
    generated: Sequence[Image.Image],
    parities: Sequence[ImageParity],
) -> Image.Image:
    """An RGB image with one row per case: source, image of diffusers, image of the bundle, difference and measurements."""
    rows = [
        [_thumbnail(image) for image in (case.request.image, reference, ours, _difference(ours, reference))]
        for case, reference, ours in zip(cases, references, generated, strict=True)
    ]
    side = max(_LEAST_COLUMN, *(image.width for row in rows for image in row))
    heights = [2 * _LINE + max(image.height for image in row) + _MARGIN for row in rows]
    width = len(_COLUMNS) * (side + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, _MARGIN + _LINE + sum(heights)), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    left = [_MARGIN + column * (side + _MARGIN) for column in range(len(_COLUMNS))]
    for x, title in zip(left, _COLUMNS, strict=True):
        draw.text((x, _MARGIN // 2), title, _INK, font)
    top = _MARGIN + _LINE
    for row, parity, height in zip(rows, parities, heights, strict=True):
        draw.text((_MARGIN, top), parity.case, _INK, font)
        draw.text((_MARGIN, top + _LINE), _caption(parity), _GOOD if parity.passed else _BAD, font)
        for x, image in zip(left, row, strict=True):
            sheet.paste(image, (x, top + 2 * _LINE))
        top += height
    return sheet


def _caption(parity: ImageParity) -> str:
    return (
        f"{verdict(parity.passed)}: PSNR {decibels(parity.psnr_db)}, SSIM {parity.ssim:.4f}, "
        f"greatest difference {parity.max_abs_error}/255"
    )


def _difference(image: Image.Image, reference: Image.Image) -> Image.Image:
    """The amplified difference; white if the sizes differ."""
    if image.size != reference.size:
        return Image.new("RGB", reference.size, _PAPER)
    difference = ImageChops.difference(image.convert("RGB"), reference.convert("RGB"))
    return difference.point(lambda value: min(value * AMPLIFICATION, 255))


def _thumbnail(image: Image.Image) -> Image.Image:
    small = image.convert("RGB")
    small.thumbnail((GREATEST_SIDE, GREATEST_SIDE))
    return small

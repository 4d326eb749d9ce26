"""Comparison of whole images: the cases cover a server's requests, the limits are as documented, and the sheet shows the
images."""

import dataclasses
import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from diffusers import AutoPipelineForImage2Image
from img2img_export.errors import ExportError
from img2img_export.verify import images
from img2img_export.verify.images import (
    AMPLIFICATION,
    ImageCase,
    compare_images,
    image_cases,
    make_references,
    make_sheet,
    measure,
    sample_image,
)
from img2img_server.bundle.manifest import LIMITS, ImageParity, Manifest, Precision, Source, Verification
from PIL import Image

Get = Callable[[str], Path]


@pytest.fixture(scope="module")
def pipeline(tiny_model: Get) -> Any:
    loaded = AutoPipelineForImage2Image.from_pretrained(tiny_model("sd1"), use_safetensors=True, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


class WithStrength:
    def __call__(self, prompt: str, image: Any, strength: float) -> None: ...


class WithoutStrength:
    def __call__(self, prompt: str, image: Any, image_guidance_scale: float) -> None: ...


def model(kind: type = WithStrength, part: str = "unet", latents: int = 64) -> Any:
    made = kind()
    made.vae_scale_factor = 8
    setattr(made, part, SimpleNamespace(config=SimpleNamespace(sample_size=latents)))
    return made


@pytest.mark.parametrize("part", ["unet", "transformer"])
@pytest.mark.parametrize("latents", [8, 64, 128])
@pytest.mark.parametrize("family", ["stable-diffusion", "whole"])
def test_cases_cover_prompts_strengths_and_guidance(part: str, latents: int, family: str) -> None:
    cases = image_cases(model(part=part, latents=latents), family)
    requests = [case.request for case in cases]
    assert len({case.name for case in cases}) == len(cases) == 6
    pairs = {(request.prompt, request.strength) for request in requests}
    prompts, strengths = {prompt for prompt, _ in pairs}, {strength for _, strength in pairs}
    assert (len(prompts), len(strengths)) == (3, 2)
    assert pairs == set(itertools.product(prompts, strengths))
    assert {request.guidance_scale > 1 for request in requests} == {True, False}
    assert all(4 <= request.num_inference_steps <= 8 for request in requests)
    assert len({request.seeds for request in requests}) == 6
    sizes = {request.image.size for request in requests}
    assert len(sizes) == 2
    own = min(latents * 8, 256)
    (other,) = sizes - {(own, own)}
    assert max(other) < own or (family == "whole" and own < 128), "a size that is half of 64 would be none for some"
    assert any(width != height for width, height in sizes) == (family != "whole")
    multiple = 16 if part == "transformer" else 8
    assert all(side % multiple == 0 for size in sizes for side in size)
    for case in cases:
        width, height = case.request.image.size
        assert case.name.startswith(" ".join(case.request.prompt.split()[:2]))
        assert f"{width} x {height}" in case.name
        assert f"strength {case.request.strength}, {case.request.num_inference_steps} steps" in case.name


def test_pipeline_without_strength_has_half_the_cases() -> None:
    cases = image_cases(model(WithoutStrength), "whole")
    assert len(cases) == 3
    assert not any("strength" in case.name for case in cases)


def test_identical_images_pass_every_limit() -> None:
    image = sample_image(64, 48)
    for precision in LIMITS:
        found = measure("same", image, image, precision)
        assert found == ImageParity("same", 0, 999.0, True, found.ssim)
        assert found.ssim == pytest.approx(1.0)


def changed(image: Image.Image, by: int | np.ndarray, rows: int) -> Image.Image:
    """The image with its uppermost rows darker, or lighter if they are dark, by so much in each colour."""
    pixels = np.asarray(image).astype(int)
    pixels[:rows] += np.where(pixels[:rows] > 127, -by, by)
    return Image.fromarray(pixels.astype(np.uint8))


def test_fp32_tolerates_a_difference_of_one_level_but_not_two() -> None:
    image = sample_image(64, 64)
    for by, passed in ((1, True), (2, False)):
        found = measure("a", changed(image, by, rows=8), image)
        assert (found.max_abs_error, found.passed) == (by, passed)
        assert found.psnr_db == pytest.approx(10 * np.log10(255**2 / (by**2 / 8)))
        assert found.ssim > 0.999
        assert measure("a", changed(image, by, rows=8), image, "fp16").passed


@pytest.mark.parametrize("precision", LIMITS)
def test_each_precision_has_its_own_limits(precision: Precision) -> None:
    image = sample_image(64, 64)
    found = [measure("a", changed(image, by, rows=64), image, precision) for by in range(60)]
    limits = LIMITS[precision]
    for part in found:
        kept = part.max_abs_error <= limits.max_abs_error and part.psnr_db >= limits.psnr_db and part.ssim >= limits.ssim
        assert part.passed == kept
    assert found[0].passed
    assert not found[-1].passed


def test_noise_that_passes_psnr_fails_ssim() -> None:
    """Noise that a PSNR lets pass, in an image with little in it."""
    flat = np.full((64, 64, 3), 100, np.uint8)
    flat[:32] += 10
    noise = np.random.default_rng(0).integers(-12, 13, flat.shape)
    found = measure("a", Image.fromarray((flat + noise).astype(np.uint8)), Image.fromarray(flat), "int8")
    assert found.psnr_db > LIMITS["int8"].psnr_db
    assert found.ssim < LIMITS["int8"].ssim
    assert not found.passed


@pytest.mark.parametrize("colour", ["black", "#7f7f7f", "white"])
def test_single_color_image_never_passes(colour: str) -> None:
    image = Image.new("RGB", (64, 64), colour)
    assert not any(measure("a", image, image, precision).passed for precision in LIMITS)


def test_image_of_another_size_never_passes() -> None:
    found = measure("a", sample_image(64, 56), sample_image(64, 64))
    assert not found.passed
    assert found.ssim == 0.0


def test_server_pipeline_matches_diffusers(pipeline: Any, tmp_path: Path) -> None:
    """With a bundle of PyTorch weights, which needs no graphs."""
    cases = image_cases(pipeline, "stable-diffusion")
    references = make_references(pipeline, cases)
    pipeline.save_pretrained(tmp_path, safe_serialization=True)
    manifest = Manifest(
        source=Source(),
        pipeline_class=type(pipeline).__name__,
        family="stable-diffusion",
        backend="torch",
        components=(),
        files={},
        tools={},
        verification=Verification(False),
    )
    compared, drawn = compare_images(tmp_path, manifest, cases, references, "fp32")
    assert [part.case for part in compared] == [case.name for case in cases]
    assert all(part.passed for part in compared), compared
    assert [image.size for image in drawn] == [case.request.image.size for case in cases]
    strangers = [*references[1:], references[0]]
    compared, _ = compare_images(tmp_path, manifest, cases, strangers, "int8")
    assert not any(part.passed for part in compared)
    (tmp_path / "unet" / "config.json").unlink()
    with pytest.raises(ExportError, match="the server's pipeline cannot run the model"):
        compare_images(tmp_path, manifest, cases, references, "fp32")


def test_only_arguments_known_to_the_pipeline_are_passed(pipeline: Any) -> None:
    case = image_cases(pipeline, "stable-diffusion")[0]
    known = set(inspect.signature(pipeline.__call__).parameters)
    offered = images._arguments(pipeline, case.request)
    assert set(offered) <= known
    assert {"prompt", "negative_prompt", "image", "strength", "num_inference_steps", "guidance_scale"} <= set(offered)
    assert set(images._arguments(model(WithoutStrength), case.request)) == {"prompt", "image"}


def rows_of(count: int, width: int, height: int) -> list[ImageCase]:
    cases = image_cases(model(), "stable-diffusion")[:count]
    return [ImageCase(case.name, _resized(case.request, width, height)) for case in cases]


def _resized(request: Any, width: int, height: int) -> Any:
    return dataclasses.replace(request, image=sample_image(width, height))


@pytest.mark.parametrize("size", [(64, 48), (256, 256), (1024, 768)])
def test_sheet_shows_each_image_and_the_difference_times_sixteen(size: tuple[int, int]) -> None:
    cases = rows_of(2, *size)
    reference = sample_image(*size)
    difference = np.array([4, 0, 2])
    ours = changed(reference, difference, rows=size[1])
    parities = [measure(case.name, ours, reference) for case in cases]
    sheet = make_sheet(cases, [reference] * 2, [ours] * 2, parities)
    assert sheet.mode == "RGB"
    scale = min(1.0, 256 / max(size))
    width, height = round(size[0] * scale), round(size[1] * scale)
    assert 4 * width <= sheet.width <= 4 * max(width, 128) + 100
    assert 2 * height <= sheet.height <= 2 * height + 200
    shown = np.all(np.asarray(sheet) == difference * AMPLIFICATION, axis=-1)
    assert shown.sum() == 2 * width * height
    same = make_sheet(cases, [reference] * 2, [reference] * 2, parities)
    assert not np.all(np.asarray(same) == difference * AMPLIFICATION, axis=-1).any()


def test_sheet_shows_images_of_another_size() -> None:
    cases = rows_of(1, 64, 64)
    reference, ours = sample_image(64, 64), sample_image(64, 96)
    sheet = make_sheet(cases, [reference], [ours], [measure("a", ours, reference)])
    assert sheet.height > 96

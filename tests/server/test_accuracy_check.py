"""The accuracy check: a bundle has reference images from diffusers, and only pipelines that reproduce them pass."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from img2img_server.bundle.manifest import Manifest, check_bundle, read_manifest, write_manifest
from img2img_server.errors import BundleError
from img2img_server.runtime import accuracy_check
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from PIL import Image

Get = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(bundle: Get) -> tuple[Path, Manifest]:
    return bundle("sd1"), read_manifest(bundle("sd1"))


@pytest.fixture(scope="module")
def pipeline(made: tuple[Path, Manifest]) -> Any:
    return load_pipeline(*made, Execution("cpu"))


def blur(pipeline: Any, monkeypatch: pytest.MonkeyPatch, spread: float) -> None:
    """Has the pipeline's UNet predict with an error of `spread` times what it predicts, as an engine that rounds does."""
    forward, generator = pipeline._pipe.unet.forward, torch.Generator().manual_seed(0)

    def rounded(*arguments: Any, **named: Any) -> Any:
        (sample,) = forward(*arguments, **named)
        return (sample + spread * sample.std() * torch.randn(sample.shape, generator=generator),)

    monkeypatch.setattr(pipeline._pipe.unet, "forward", rounded)


def test_bundle_contains_its_reference_images(made: tuple[Path, Manifest]) -> None:
    path, manifest = made
    assert [reference.case for reference in manifest.references] == [part.case for part in manifest.verification.pictures]
    for reference in manifest.references:
        assert {reference.source, reference.picture} <= set(manifest.files)
        with Image.open(path / reference.source) as source, Image.open(path / reference.picture) as image:
            assert (image.mode, image.size) == ("RGB", source.size)


def test_verified_bundle_passes_and_matches_references_within_one_level(pipeline: Any, made: tuple[Path, Manifest]) -> None:
    verdict = accuracy_check.judge(pipeline, *made, accuracy_check.least_psnr_db("fp32"))
    assert verdict.passed
    assert verdict.psnr_db > 60


def test_small_rounding_errors_pass_for_bf16_but_not_for_fp32(
    pipeline: Any, made: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    blur(pipeline, monkeypatch, 0.01)
    assert accuracy_check.judge(pipeline, *made, accuracy_check.least_psnr_db("bf16")).passed
    verdict = accuracy_check.judge(pipeline, *made, accuracy_check.least_psnr_db("fp32"))
    assert not verdict.passed
    assert "PSNR" in verdict.problem


def test_noise_fails(pipeline: Any, made: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    blur(pipeline, monkeypatch, 2.0)
    assert not accuracy_check.judge(pipeline, *made, accuracy_check.least_psnr_db("bf16")).passed


@pytest.mark.parametrize(("kind", "problem"), [("black", "only one color"), ("small", "the image is (8, 8)")])
def test_black_or_wrongly_sized_images_fail(kind: str, problem: str, made: tuple[Path, Manifest]) -> None:
    known = accuracy_check.cases(made[1], made[0])
    drawn = [Image.new("RGB", case.image.size if kind == "black" else (8, 8)) for case in known]
    verdict = accuracy_check.compare(known, drawn, 0.0)
    assert not verdict.passed
    assert problem in verdict.problem


def test_bundle_without_references_fails_the_accuracy_check(pipeline: Any, made: tuple[Path, Manifest]) -> None:
    path, manifest = made
    verdict = accuracy_check.judge(pipeline, path, dataclasses.replace(manifest, references=()), 0.0)
    assert not verdict.passed
    assert "no reference images" in verdict.problem


def test_references_are_files_of_the_bundle(made: tuple[Path, Manifest], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made[0], tmp_path / "copy"))
    (copy / made[1].references[0].picture).write_bytes(b"no image")
    with pytest.raises(BundleError, match="not the file that was verified"):
        check_bundle(copy, made[1])
    with pytest.raises(BundleError, match="cannot be read"):
        accuracy_check.cases(made[1], copy)
    stray = dataclasses.replace(made[1].references[0], source="../source.png")
    with pytest.raises(BundleError, match="outside the bundle"):
        accuracy_check.cases(dataclasses.replace(made[1], references=(stray,)), copy)


def test_old_manifest_without_references_still_loads(made: tuple[Path, Manifest], tmp_path: Path) -> None:
    write_manifest(tmp_path, dataclasses.replace(made[1], references=()))
    path = tmp_path / "manifest.json"
    data = json.loads(path.read_text())
    del data["references"]
    path.write_text(json.dumps(data))
    assert read_manifest(tmp_path).references == ()


def test_psnr_matches_the_formula() -> None:
    reference = Image.new("RGB", (4, 4), (10, 10, 10))
    assert accuracy_check.psnr_db(reference, reference) == accuracy_check.INFINITE_PSNR
    other = Image.fromarray(np.asarray(reference) + np.uint8(5))
    assert accuracy_check.psnr_db(other, reference) == pytest.approx(20 * np.log10(255 / 5))

"""The manifest and the checks of img2img_server.bundle.manifest, on small files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from img2img_server.bundle.manifest import (
    MANIFEST_NAME,
    Component,
    ComponentParity,
    ImageParity,
    Manifest,
    Source,
    TensorSpec,
    Verification,
    check_bundle,
    digest_files,
    list_files,
    read_manifest,
    write_manifest,
)
from img2img_server.errors import BundleError

MANIFEST = Manifest(
    source=Source(path="/models/a", variant="fp16", allow_patterns=("unet/*",), digest="d"),
    pipeline_class="StableDiffusionImg2ImgPipeline",
    family="stable-diffusion",
    backend="onnx",
    components=(
        Component("unet", "fp32", 18, (TensorSpec("sample", "float32", ("batch", 4, "height", "width")),), ()),
        Component("vae", "fp16"),
    ),
    files={},
    tools={"torch": "2.13"},
    verification=Verification(
        True, (ComponentParity("unet", "batch 1", 1e-6, 2e-7, True),), (ImageParity("guided", 1, 90.5, True),)
    ),
    options={"backend": "auto"},
)


@pytest.fixture
def small_bundle(tmp_path: Path) -> Path:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.onnx").write_bytes(b"graph")
    (tmp_path / "model_index.json").write_text("{}")
    write_manifest(tmp_path, dataclasses.replace(MANIFEST, files=digest_files(tmp_path, list_files(tmp_path))))
    return tmp_path


def change(bundle: Path, **values: Any) -> None:
    path = bundle / MANIFEST_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_manifest_round_trips(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST


def test_an_undamaged_bundle_passes(small_bundle: Path) -> None:
    check_bundle(small_bundle, read_manifest(small_bundle))


def test_the_manifest_lists_every_file_but_itself(small_bundle: Path) -> None:
    assert set(read_manifest(small_bundle).files) == {"model_index.json", "unet/model.onnx"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"surprise": 1}, "unknown keys"),
        ({"format_version": 99}, "export the model again"),
        ({"format_version": True}, "export the model again"),
        ({"backend": "tensorrt"}, "expected one of"),
        ({"family": 3}, "expected str"),
        ({"components": [{"name": "unet"}]}, "precision"),
        ({"verification": {"passed": "yes"}}, "expected bool"),
        ({"source": {"path": 5}}, "unexpected int"),
        ({"files": ["a"]}, "expected dict"),
    ],
)
def test_manifest_with_invalid_values_is_refused(small_bundle: Path, values: dict[str, Any], message: str) -> None:
    change(small_bundle, **values)
    with pytest.raises(BundleError, match=message):
        read_manifest(small_bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"a"'])
def test_a_damaged_manifest_is_refused(small_bundle: Path, text: str) -> None:
    (small_bundle / MANIFEST_NAME).write_text(text)
    with pytest.raises(BundleError):
        read_manifest(small_bundle)


def test_manifest_that_is_not_text_is_refused(small_bundle: Path) -> None:
    (small_bundle / MANIFEST_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError):
        read_manifest(small_bundle)


def test_directory_without_manifest_is_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        read_manifest(tmp_path)


def test_file_with_changed_content_is_refused(small_bundle: Path) -> None:
    (small_bundle / "unet" / "model.onnx").write_bytes(b"grapH")
    with pytest.raises(BundleError, match=r"unet/model\.onnx"):
        check_bundle(small_bundle, read_manifest(small_bundle))


def test_a_missing_file_is_refused(small_bundle: Path) -> None:
    (small_bundle / "unet" / "model.onnx").unlink()
    with pytest.raises(BundleError, match="is missing"):
        check_bundle(small_bundle, read_manifest(small_bundle))


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "unet/../../secret"])
def test_a_file_outside_is_refused(small_bundle: Path, name: str) -> None:
    change(small_bundle, files={name: "0" * 64})
    with pytest.raises(BundleError, match="outside"):
        check_bundle(small_bundle, read_manifest(small_bundle))


def test_symlink_to_outside_is_refused(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "model.onnx"
    elsewhere.write_bytes(b"graph")
    (small_bundle / "unet" / "model.onnx").unlink()
    (small_bundle / "unet" / "model.onnx").symlink_to(elsewhere)
    with pytest.raises(BundleError, match="outside"):
        check_bundle(small_bundle, read_manifest(small_bundle))


def test_unverified_bundle_is_refused(small_bundle: Path) -> None:
    change(small_bundle, verification={"passed": False})
    with pytest.raises(BundleError, match="did not pass"):
        check_bundle(small_bundle, read_manifest(small_bundle))

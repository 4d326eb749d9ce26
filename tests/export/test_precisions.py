"""Graphs in other precisions than fp32: their types, the parts that stay in fp32, and that the server runs them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import make_request
from img2img_export import component
from img2img_export.build import export_model
from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions
from img2img_export.verify import parity
from img2img_export.verify.images import sample_image
from img2img_server.bundle.manifest import LIMITS, Manifest, Precision, check_bundle, read_manifest
from img2img_server.engine.request import run_alone
from img2img_server.errors import BundleError
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from short_exports import cut_short

Get = Callable[[str], Path]

FP16 = "sd1:fp16:speedups"
"""The bundle in fp16 of these tests, test_speedups.py and test_architectures.py: its export takes twice as long as in fp32."""
PARTS = {"text_encoder", "unet", "vae_encoder", "vae_decoder"}


def precisions(manifest: Manifest) -> dict[str, str]:
    return {part.name: part.precision for part in manifest.components}


def draw(bundle: Path) -> np.ndarray:
    request = make_request(image=sample_image(64, 64), prompt="a lake", seeds=(1,))
    return np.asarray(run_alone(load_pipeline(bundle, read_manifest(bundle), Execution("cpu")), request)[0], np.int16)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_bundle_is_half_as_large_and_verified(precision: Precision, bundle: Get) -> None:
    half = bundle(FP16 if precision == "fp16" else "sd1:bf16")
    manifest, full = read_manifest(half), read_manifest(bundle("sd1"))
    check_bundle(half, manifest)
    assert precisions(manifest) == dict.fromkeys(PARTS, precision)
    assert manifest.precision == precision
    sizes = {part.name: (half / part.name / "model.onnx_data").stat().st_size for part in full.components}
    for part in full.components:
        assert sizes[part.name] < 0.55 * (bundle("sd1") / part.name / "model.onnx_data").stat().st_size
    timestep = next(item for item in next(p for p in manifest.components if p.name == "unet").inputs if item.name == "timestep")
    assert timestep.type == "float32", "half precision has no number for most timesteps"
    assert any(part.fused for part in manifest.components) == (precision == "fp16")
    compared = manifest.verification.components
    assert {part.component for part in compared} == PARTS
    assert max(part.relative_error for part in compared) <= LIMITS[precision].relative_error
    assert min(part.relative_error for part in compared if part.graph == "plain") > 1e-5, "it must have been computed narrowly"


def test_fused_graphs_are_listed_and_verified(bundle: Get) -> None:
    manifest = read_manifest(bundle(FP16))
    fused = {part.name: part.fused for part in manifest.components}
    assert fused == {name: "" if name == "text_encoder" else f"{name}/cuda/model.onnx" for name in PARTS}
    assert {part.component for part in manifest.verification.components if part.graph == "fused"} == PARTS - {"text_encoder"}
    assert all(path in manifest.files for path in fused.values() if path)
    assert not any(part.fused for part in read_manifest(bundle("sd1")).components)


def test_fp16_overflow_keeps_the_component_in_fp32_with_the_reason(
    tiny_model: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(component, "_FUSABLE", ())  # fused graphs take half of the export
    options = ExportOptions(source=str(tiny_model("sdxl-overflow")), output=tmp_path / "out", precision="fp16")
    with cut_short(1):
        manifest = export_model(options).manifest
    kept = {part.name: part.reason for part in manifest.components if part.precision == "fp32"}
    assert set(kept) == {"vae_decoder"}
    assert "NaN, infinite values" in kept["vae_decoder"]
    assert manifest.verification.passed
    assert set(precisions(manifest).values()) == {"fp16", "fp32"}


def test_components_that_fail_in_int8_fall_back_with_the_reason(
    bundle: Get, tiny_model: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server draws with the components that stay in int8."""
    reference = draw(bundle("sd1"))
    strict = {**LIMITS, "int8": replace(LIMITS["int8"], relative_error=0.02)}
    monkeypatch.setattr(component, "limits_of", lambda precision, narrow: strict[precision])
    options = ExportOptions(source=str(tiny_model("sd1")), output=tmp_path / "out", precision="int8")
    with cut_short(2):
        manifest = export_model(options).manifest
    assert precisions(manifest) | {"unet": ""} == {
        "text_encoder": "fp32",
        "unet": "",
        "vae_encoder": "fp32",
        "vae_decoder": "int8",
    }
    reason = next(part.reason for part in manifest.components if part.name == "text_encoder")
    assert reason.startswith("text_encoder differs from PyTorch (")
    assert 0.02 < float(reason.partition("relative error ")[2].partition(",")[0]) < 0.1
    assert manifest.verification.passed
    assert np.abs(draw(tmp_path / "out") - reference).mean() <= 6


@pytest.mark.nightly
def test_graphs_that_fail_to_open_in_fp16_stay_in_fp32(tiny_model: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def refuse_once(path: Path) -> Any:
        opened.append(path.parent.name)
        if opened.count("text_encoder") == 1 and opened[-1] == "text_encoder":
            raise ExportError("ONNX Runtime cannot open text_encoder: no such kernel")
        return parity.open_graph(path)

    monkeypatch.setattr(component, "open_graph", refuse_once)
    options = ExportOptions(source=str(tiny_model("sd1")), output=tmp_path / "out", precision="fp16")
    with cut_short(1):
        manifest = export_model(options).manifest
    kept = [part for part in manifest.components if part.precision == "fp32"]
    assert [(part.name, part.reason) for part in kept] == [
        ("text_encoder", "ONNX Runtime cannot open text_encoder: no such kernel")
    ]


@pytest.mark.nightly
def test_the_server_runs_int8_on_a_cpu(bundle: Get) -> None:
    assert np.abs(draw(bundle("sd1:int8")) - draw(bundle("sd1"))).mean() <= 6


def test_server_runs_fp16_on_a_cpu_but_refuses_bf16(bundle: Get) -> None:
    assert np.abs(draw(bundle(FP16)) - draw(bundle("sd1"))).max() <= 4
    with pytest.raises(BundleError, match="bf16 graphs need a GPU"):
        draw(bundle("sd1:bf16"))


def test_pytorch_weights_are_stored_in_the_requested_precision(tiny_model: Get, tmp_path: Path) -> None:
    options = ExportOptions(source=str(tiny_model("sd1")), output=tmp_path / "out", precision="fp16", backend="torch")
    with cut_short(1):
        manifest = export_model(options).manifest
    assert {part.precision for part in manifest.components} == {"fp16"}
    assert manifest.verification.passed
    draw(tmp_path / "out")

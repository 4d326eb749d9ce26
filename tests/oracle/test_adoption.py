"""Directories that optimum-cli exported become bundles: verified as they are, and run as far as they can."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from adopting import adopt
from fakes import make_request
from img2img_export.convert.graphs import quiet
from img2img_export.errors import ExportError
from img2img_export.verify.images import sample_image
from img2img_server.bundle.manifest import check_bundle
from img2img_server.engine.request import run_alone
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline

Get = Callable[[str], Path]


@pytest.fixture(scope="module")
def exported(tiny_model: Get, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of `optimum-cli export onnx` for a tiny model."""
    from optimum.exporters.onnx import main_export

    output = tmp_path_factory.mktemp("optimum") / "sd1"
    with quiet():
        main_export(str(tiny_model("sd1")), output, task="image-to-image", do_validation=False, no_post_process=True)
    return output


def test_adopted_graphs_are_verified_against_their_source_model(exported: Path, tiny_model: Get, tmp_path: Path) -> None:
    outcome = adopt(exported, tmp_path / "out", tiny_model("sd1"))
    manifest = outcome.manifest
    check_bundle(outcome.path, manifest)
    assert (manifest.backend, manifest.family, manifest.size_multiple) == ("onnx", "whole", 16)
    assert manifest.backend_reason == "its UNet takes one timestep per batch"
    assert manifest.verification.reference == "diffusers in fp32"
    assert {part.component for part in manifest.verification.components} == {part.name for part in manifest.components}
    assert max(part.max_abs_error for part in manifest.verification.pictures) <= 1
    assert adopt(exported, tmp_path / "out", tiny_model("sd1")).up_to_date
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_the_source_model_the_reference_is_optimum(exported: Path, tmp_path: Path) -> None:
    outcome = adopt(exported, tmp_path / "out")
    assert outcome.manifest.verification.reference == "optimum's pipeline over the same graphs"
    assert outcome.manifest.verification.passed
    pipeline = load_pipeline(outcome.path, outcome.manifest, Execution("cpu"))
    assert pipeline.size_multiple == 16
    request = make_request(image=sample_image(96, 64), prompt="a lake", seeds=(1,))
    (image,) = run_alone(pipeline, request)
    assert image.size == (96, 64)
    assert np.asarray(image).std() > 10


def test_graphs_of_another_model_are_refused(exported: Path, tiny_model: Get, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(exported, tmp_path / "changed"))
    path = changed / "unet" / "model.onnx"
    model = onnx.load(path)
    weight = next(item for item in model.graph.initializer if "conv_out.weight" in item.name)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.01, weight.name))
    onnx.save(model, path)
    with pytest.raises(ExportError, match="unet differs from PyTorch"):
        adopt(changed, tmp_path / "out", tiny_model("sd1"))
    assert not (tmp_path / "out").exists()

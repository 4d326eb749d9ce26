"""Directories of graphs that were exported elsewhere become bundles: verified as they are, and run as far as they can.

The graphs here are a bundle's own, its UNet with one timestep for a whole batch, as optimum-cli makes it. tests/oracle adopts
what optimum-cli itself made.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from adopting import adopt
from fakes import make_request
from img2img_export.build import export_model
from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions
from img2img_export.verify.images import sample_image
from img2img_server.bundle.manifest import check_bundle, read_manifest
from img2img_server.engine.request import run_alone
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from onnx import helper

Get = Callable[[str], Path]


@pytest.fixture(scope="module")
def exported(bundle: Get, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs of a tiny model, its UNet's timestep a scalar."""
    output = tmp_path_factory.mktemp("graphs") / "sd1"
    manifest = read_manifest(bundle("sd1"))
    folders = {Path(name).parts[0] for name in manifest.files} - {"verification"}
    for name in folders:
        (shutil.copytree if (bundle("sd1") / name).is_dir() else shutil.copy)(bundle("sd1") / name, _parent(output) / name)
    path = output / "unet" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.input[:] = ["timestep_of_each" if name == "timestep" else name for name in node.input]
    shape = onnx.numpy_helper.from_array(np.array([1], np.int64), "one")
    model.graph.initializer.append(shape)
    model.graph.node.insert(0, helper.make_node("Reshape", ["timestep", "one"], ["timestep_of_each"]))
    (timestep,) = [item for item in model.graph.input if item.name == "timestep"]
    del timestep.type.tensor_type.shape.dim[:]
    onnx.save(model, path)
    return output


def _parent(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


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


def test_bundle_of_adopted_graphs_makes_an_image(exported: Path, tiny_model: Get, tmp_path: Path) -> None:
    outcome = adopt(exported, tmp_path / "out", tiny_model("sd1"))
    pipeline = load_pipeline(outcome.path, outcome.manifest, Execution("cpu"))
    assert pipeline.size_multiple == 16
    request = make_request(image=sample_image(96, 64), prompt="a lake", seeds=(1,))
    (image,) = run_alone(pipeline, request)
    assert image.size == (96, 64)
    assert np.asarray(image).std() > 10


def test_without_optimum_onnx_the_error_asks_for_a_reference(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="pass --reference with the model they were exported from"):
        adopt(exported, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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


def test_weight_options_are_refused_for_graphs(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="already holds ONNX graphs"):
        export_model(ExportOptions(source=str(exported), output=tmp_path / "out", precision="fp16"))

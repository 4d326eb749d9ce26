"""The model store: which bundles are served, and which are refused and why."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import FakePipeline
from img2img_server.bundle.manifest import FORMAT_VERSION, MANIFEST_NAME, Verification, digest_files, list_files, write_manifest
from img2img_server.errors import BundleError
from img2img_server.models.registry import Model, ModelRegistry, ModelState
from running import manifest


def make_bundle(folder: Path, passed: bool = True) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet").mkdir()
    (folder / "unet" / "model.onnx").write_bytes(b"graph")
    files = digest_files(folder, list_files(folder))
    problems = () if passed else ("unet: 0.2 of 0.01", "the image is black")
    write_manifest(folder, replace(manifest("acme/m"), files=files, verification=Verification(passed, problems=problems)))
    return folder


def load(folder: Path, default: str | None = None) -> ModelRegistry:
    return ModelRegistry.load(folder, lambda path, manifest: FakePipeline(), default)


def test_unverified_bundle_is_served_only_if_allowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_bundle(tmp_path / "bad", passed=False)
    with pytest.raises(BundleError, match="did not pass verification"):
        load(folder)
    store = ModelRegistry.load(folder, lambda path, manifest: FakePipeline(), allow_unverified=True)
    assert list(store.pipelines()) == ["bad"]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "'bad' did not pass verification" in warning
    assert "unet: 0.2 of 0.01; the image is black" in warning, "what was measured at export is repeated"
    (folder / "unet" / "model.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match="SHA-256 differs"):
        ModelRegistry.load(folder, lambda path, manifest: FakePipeline(), allow_unverified=True)


def problem(folder: Path) -> str:
    (model,) = [model for model in load(folder) if model.id == "bad"]
    assert model.pipeline is None
    return model.problem


def test_every_bundle_of_a_folder_is_served(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    make_bundle(tmp_path / "a")
    (tmp_path / "notes").mkdir()
    make_bundle(tmp_path / ".hidden")
    assert list(load(tmp_path).pipelines()) == ["a", "b"]


def test_symlinked_bundle_is_named_after_the_symlink(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("first", "second"):
        make_bundle(tmp_path / "elsewhere" / name / "onnx")
        (folder / name).symlink_to(tmp_path / "elsewhere" / name / "onnx")
    (folder / "again").symlink_to("first")
    assert list(load(folder).pipelines()) == ["again", "first", "second"]


def test_store_that_is_a_symlink_to_one_bundle_is_named_after_it(tmp_path: Path) -> None:
    make_bundle(tmp_path / "versions" / "3")
    (tmp_path / "current").symlink_to("versions/3")
    assert list(load(tmp_path / "current").pipelines()) == ["current"]
    assert list(load(tmp_path / "versions" / ".." / "current").pipelines()) == ["current"]


def test_two_models_with_one_id_are_an_error_that_names_both(tmp_path: Path) -> None:
    models = [Model("a", bundle=tmp_path / name / "a") for name in ("one", "two")]
    with pytest.raises(BundleError, match=f"{tmp_path}/one/a and {tmp_path}/two/a"):
        ModelRegistry(models)


def test_invalid_bundles_are_logged_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_bundle(tmp_path / "good")
    make_bundle(tmp_path / "nested" / "inner")
    (tmp_path / "notes").mkdir()
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "model_index.json").write_text("{}")
    (tmp_path / "dream.SAFETENSORS").write_bytes(b"")
    (tmp_path / "readme.txt").write_text("")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / ".staging").mkdir()
    load(tmp_path)
    told = {
        Path(record.args[0]).name: record.getMessage()  # type: ignore[index, arg-type]
        for record in caplog.records
        if "is not served" in record.getMessage()
    }
    assert told.keys() == {"nested", "notes", "checkpoint", "dream.SAFETENSORS", "readme.txt", "gone"}
    assert "inner" in told["nested"]
    assert "without manifest.json" in told["notes"]
    assert "img2img export" in told["checkpoint"]
    assert "img2img export" in told["dream.SAFETENSORS"]
    assert "a file" in told["readme.txt"]
    assert "nowhere" in told["gone"]


def test_single_bundle_folder_is_a_store(tmp_path: Path) -> None:
    store = load(make_bundle(tmp_path / "one"))
    assert (list(store.pipelines()), store.default) == (["one"], "one")


def test_folder_without_bundles_error_suggests_export(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="img2img export"):
        load(tmp_path)
    with pytest.raises(BundleError, match="does not exist"):
        load(tmp_path / "nope")


def test_an_unknown_default_is_an_error(tmp_path: Path) -> None:
    make_bundle(tmp_path / "a")
    with pytest.raises(BundleError, match="'nope' is not in the store, which has a"):
        load(tmp_path, "nope")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda bundle: (bundle / "unet" / "model.onnx").write_bytes(b"other"), "SHA-256 differs"),
        (lambda bundle: (bundle / "unet" / "model.onnx").unlink(), "unet/model.onnx is missing"),
        (lambda bundle: (bundle / MANIFEST_NAME).write_text("{"), "cannot be read"),
        (lambda bundle: (bundle / MANIFEST_NAME).write_text('{"format_version": 99}'), "format version 99"),
        (lambda bundle: (bundle / MANIFEST_NAME).write_text(f'{{"format_version": {FORMAT_VERSION}, "x": 1}}'), "unknown keys"),
        (lambda bundle: make_bundle(bundle, passed=False), "did not pass verification"),
    ],
)
def test_damaged_bundle_is_refused_and_others_are_served(tmp_path: Path, damage: object, why: str) -> None:
    make_bundle(tmp_path / "good")
    damage(make_bundle(tmp_path / "bad"))  # type: ignore[operator]
    assert why in problem(tmp_path)
    assert list(load(tmp_path).pipelines()) == ["good"]
    assert load(tmp_path, "bad").get("bad").state is ModelState.FAILED


def test_a_manifest_that_points_outside_is_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path / "good")
    bad = make_bundle(tmp_path / "bad")
    data = json.loads((bad / MANIFEST_NAME).read_text())
    data["files"]["../good/model_index.json"] = data["files"]["model_index.json"]
    (bad / MANIFEST_NAME).write_text(json.dumps(data))
    assert "outside the bundle" in problem(tmp_path)


def test_store_with_only_damaged_bundles_is_an_error(tmp_path: Path) -> None:
    (make_bundle(tmp_path / "bad") / "unet" / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"no model can be served: bad: .*unet/model.onnx is missing"):
        load(tmp_path)

"""The export from end to end: refusals, fallbacks, and that unverified bundles are never published."""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from covering import nightly_but
from diffusers import AutoPipelineForImage2Image
from img2img_cli.__main__ import main
from img2img_export.build import Outcome, export_model
from img2img_export.convert import making, models, torch_bundle, tracing
from img2img_export.convert.external_weights import ExternalWeightsGraph
from img2img_export.convert.parts import Part
from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.read.source import resolve
from img2img_server.bundle.manifest import check_bundle, list_files, read_manifest, write_manifest
from img2img_server.errors import BundleError
from short_exports import cut_short

Get = Callable[[str], Path]


def export(source: Path, output: Path, **options: Any) -> Outcome:
    with cut_short(2):
        return export_model(ExportOptions(source=str(source), output=output, **options))


@pytest.fixture
def model(tiny_model: Get, tmp_path: Path) -> Path:
    """A copy of a tiny model, to be changed."""
    return Path(shutil.copytree(tiny_model("sd1"), tmp_path / "model"))


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], None]], None]:
    """Damages every export: calls a function that changes the bundle after its UNet is written, and again after all of it is."""
    write, save = ExternalWeightsGraph.write, torch_bundle.save

    def install(change: Callable[[Path], None]) -> None:
        def write_wrong(graph: ExternalWeightsGraph, folder: Path, progress: Progress, label: str, *more: Any) -> None:
            write(graph, folder, progress, label, *more)
            if label == "unet":
                change(folder.parent)

        def save_wrong(pipeline: Any, graphs: tuple[str, ...], precision: str, bundle: Path, *more: Any) -> Any:
            saved = save(pipeline, graphs, precision, bundle, *more)
            with contextlib.suppress(FileNotFoundError):
                change(bundle)
            return saved

        monkeypatch.setattr(ExternalWeightsGraph, "write", write_wrong)
        monkeypatch.setattr(torch_bundle, "save", save_wrong)

    return install


def change_weight(directory: Path) -> None:
    path = directory / "unet" / "model.onnx"
    graph = onnx.load(path)
    weight = next(item for item in graph.graph.initializer if "conv_out.weight" in item.name)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.01, weight.name))
    onnx.save(graph, path)


def freeze_timestep(directory: Path) -> None:
    path = directory / "unet" / "model.onnx"
    graph = onnx.load(path)
    graph.graph.node.insert(0, onnx.helper.make_node("ReduceMin", ["timestep"], ["first_timestep"], keepdims=1))
    for node in graph.graph.node[1:]:
        for index, name in enumerate(node.input):
            if name == "timestep":
                node.input[index] = "first_timestep"
    onnx.save(graph, path)


def change_scheduler(directory: Path) -> None:
    path = directory / "scheduler" / "scheduler_config.json"
    if path.is_file():
        path.write_text(json.dumps({**json.loads(path.read_text()), "beta_end": 0.02}))


def break_graph(directory: Path) -> None:
    path = directory / "unet" / "model.onnx"
    graph = onnx.load(path)
    graph.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(graph, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(change_weight, "unet differs from PyTorch", marks=pytest.mark.nightly),
        pytest.param(freeze_timestep, "unet differs from PyTorch", marks=pytest.mark.nightly),
        (change_scheduler, "image differs"),
        (break_graph, "ONNX Runtime cannot open unet"),
    ],
)
def test_bundle_that_differs_from_pytorch_is_not_published(
    change: Callable[[Path], None],
    message: str,
    fault: Callable[[Callable[[Path], None]], None],
    tiny_model: Get,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault(change)
    command = ["export", str(tiny_model("sd1")), "--output", str(tmp_path / "out"), "--backend", "onnx"]
    with cut_short(2):
        assert main(command) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_failed_export_keeps_the_previous_bundle(
    fault: Callable[[Callable[[Path], None]], None], tiny_model: Get, bundle: Get, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(bundle("sd2"), tmp_path / "out"))
    fault(change_weight)
    with pytest.raises(ExportError, match="differs"):
        export(tiny_model("sd1"), output, force=True, backend="onnx")
    check_bundle(output, read_manifest(output))


def test_repeated_export_does_nothing_and_imports_nothing_heavy(tiny_model: Get, bundle: Get) -> None:
    output = bundle("sd1")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    code = """
import sys
for name in ("torch", "diffusers", "transformers", "optimum", "onnx", "onnxruntime"):
    sys.modules[name] = None
from img2img_cli.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, "export", str(tiny_model("sd1")), "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("up to date")
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


@pytest.mark.parametrize("what", ["source", "options", "tools", "damage"])
def test_another_bundle_is_replaced_only_with_force(
    what: str,
    bundle: Get,
    model: Path,
    tiny_model: Get,
    tmp_path: Path,
) -> None:
    output = Path(shutil.copytree(bundle("sd1"), tmp_path / "out"))
    manifest = read_manifest(output)
    source = tiny_model("sd1")
    if what == "source":
        source = model
    elif what == "options":
        write_manifest(output, dataclasses.replace(manifest, options={"backend": "onnx"}))
    elif what == "tools":
        write_manifest(output, dataclasses.replace(manifest, tools={**manifest.tools, "torch": "1.0"}))
    else:
        (output / "unet" / "config.json").write_text("{}")
    with pytest.raises(ExportError, match="--force"):
        export(source, output)
    if what != "damage":
        return
    assert not export(source, output, force=True).up_to_date
    check_bundle(output, read_manifest(output))
    assert export(source, output).up_to_date


def test_force_does_not_replace_other_directories(tiny_model: Get, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_text("precious")
    with pytest.raises(ExportError, match="never replaced"):
        export(tiny_model("sd1"), tmp_path, force=True)
    assert (tmp_path / "holiday.jpg").read_text() == "precious"


@pytest.fixture
def untraceable(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes torch's exporter refuse the graph of a name."""
    trace = tracing.trace

    def fail(*_: Any) -> Any:
        raise KeyError("text_model")

    def install(name: str) -> None:
        def refuse(module: Any, part: Part, *arguments: Any, **named: Any) -> ExternalWeightsGraph:
            if part.name == name:
                part = dataclasses.replace(part, call=fail)
            return trace(module, part, *arguments, **named)

        monkeypatch.setattr(making, "trace", refuse)

    return install


_REASON = "torch cannot export {}: KeyError: 'text_model'"


@pytest.mark.parametrize(
    ("graph", "backend", "graphs"),
    [
        pytest.param("vae_decoder", "hybrid", {"unet"}, marks=pytest.mark.nightly),
        ("text_encoder", "hybrid", {"unet"}),
        ("unet", "torch", set()),
    ],
)
def test_unexportable_components_run_in_pytorch_with_the_reason(
    graph: str, backend: str, graphs: set[str], untraceable: Callable[[str], None], tiny_model: Get, tmp_path: Path
) -> None:
    untraceable(graph)
    manifest = export(tiny_model("sd1"), tmp_path / "out").manifest
    assert (manifest.backend, manifest.family) == (backend, "stable-diffusion")
    assert manifest.backend_reason == _REASON.format(graph)
    assert {name.partition("/")[0] for name in list_files(tmp_path / "out") if name.endswith(".onnx")} == graphs
    assert {part.name for part in manifest.components if part.backend == "onnx"} == graphs
    assert manifest.verification.passed


def test_explicit_backend_does_not_fall_back(untraceable: Callable[[str], None], tiny_model: Get, tmp_path: Path) -> None:
    untraceable("unet")
    with pytest.raises(ExportError) as caught:
        export(tiny_model("sd1"), tmp_path / "out", backend="onnx")
    assert str(caught.value) == _REASON.format("unet")
    assert list(tmp_path.iterdir()) == []


def test_wrong_graph_falls_back_to_pytorch_with_the_reason(
    fault: Callable[[Callable[[Path], None]], None], tiny_model: Get, tmp_path: Path
) -> None:
    fault(freeze_timestep)
    manifest = export(tiny_model("sd1"), tmp_path / "out").manifest
    assert manifest.backend == "torch"
    assert "unet differs from PyTorch" in str(manifest.backend_reason)
    assert manifest.verification.passed


def test_unverified_bundle_is_published_only_on_demand_and_marked(
    fault: Callable[[Callable[[Path], None]], None], tiny_model: Get, tmp_path: Path
) -> None:
    fault(change_weight)
    outcome = export(tiny_model("sd1"), tmp_path / "out", allow_unverified=True)
    manifest = read_manifest(outcome.path)
    assert manifest.backend == "onnx"
    assert not manifest.verification.passed
    assert any("unet differs" in problem for problem in manifest.verification.problems)
    assert any("the image differs" in problem for problem in manifest.verification.problems)
    assert "NOT VERIFIED" in outcome.summary()
    with pytest.raises(BundleError, match=r"did not pass verification.*unet differs"):
        check_bundle(outcome.path, manifest)
    check_bundle(outcome.path, manifest, allow_unverified=True)


@pytest.mark.parametrize("name", ["sdxl", "kandinsky22"])
def test_torch_bundle_loads_with_autopipeline(name: str, tiny_model: Get, tmp_path: Path) -> None:
    output = export(tiny_model(name), tmp_path / "out", backend="torch").path
    manifest = read_manifest(output)
    assert manifest.backend == "torch"
    assert manifest.family == {"sdxl": "stable-diffusion-xl", "kandinsky22": "whole"}[name]
    assert manifest.backend_reason
    pipeline = AutoPipelineForImage2Image.from_pretrained(output, use_safetensors=True, local_files_only=True)
    assert type(pipeline).__name__ == manifest.pipeline_class
    assert {part.name for part in manifest.components} == set(models.modules(pipeline))
    assert all(part.precision == "fp32" for part in manifest.components)
    assert not [name for name in manifest.files if name.endswith((".bin", ".pt", ".onnx"))]


def test_onnx_backend_is_refused_for_a_model_without_graphs(tiny_model: Get, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot export all parts of KandinskyV22"):
        export(tiny_model("kandinsky22"), tmp_path / "out", backend="onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "scheduler", "offered"), [("sd3-no-t5", "DDIM", "Heun"), ("sd1", "FlowMatchEulerDiscreteScheduler", "DPM")]
)
def test_incompatible_scheduler_error_lists_the_available_ones(
    name: str, scheduler: str, offered: str, tiny_model: Get, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=f"--scheduler: this model cannot use '{scheduler}': use one of .*{offered}"):
        export(tiny_model(name), tmp_path / "out", scheduler=scheduler)
    assert list(tmp_path.iterdir()) == []


def test_decoder_without_its_prior_is_refused_with_advice(tiny_model: Get, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("prior_*")
    decoder = Path(shutil.copytree(tiny_model("kandinsky22"), tmp_path / "decoder", ignore=ignored))
    index = json.loads((decoder / "model_index.json").read_text())
    index = {name: value for name, value in index.items() if not name.startswith("prior_")}
    (decoder / "model_index.json").write_text(json.dumps({**index, "_class_name": "KandinskyV22Pipeline"}))
    with pytest.raises(ExportError, match="its prior is missing"):
        export(decoder, tmp_path / "out")


@pytest.mark.parametrize("precision", nightly_but(["fp32", "fp16"], "fp32"))
def test_a_half_precision_variant_is_compared_in_fp32(precision: str, tiny_model: Get, tmp_path: Path) -> None:
    half = AutoPipelineForImage2Image.from_pretrained(tiny_model("sd1"), torch_dtype=torch.float16, use_safetensors=True)
    half.save_pretrained(tmp_path / "half", safe_serialization=True, variant="fp16")
    with pytest.raises(ExportError, match="fp16: choose with --variant"):
        export(tmp_path / "half", tmp_path / "out")
    manifest = export(tmp_path / "half", tmp_path / "out", variant="fp16", precision=precision).manifest
    assert {part.precision for part in manifest.components} == {precision}
    limits = {"fp32": 1e-5, "fp16": 5e-3}
    assert max(part.relative_error for part in manifest.verification.components) < limits[precision]


def test_model_with_constant_output_is_refused(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_out.weight"].fill_(torch.nan)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match="one colour"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pickles_are_refused_before_anything_is_loaded(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    monkeypatch.setattr(models.Loader, "pipeline", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ExportError, match="unet has pickled weights only"):
        export(model, tmp_path / "out")


@pytest.mark.parametrize(
    "arguments", [["export"], ["export", "model"], ["export", "m", "--output", "o", "--backend", "tensorrt"]]
)
def test_wrong_arguments_exit_with_two(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_manifest_has_the_digest_of_the_source(tiny_model: Get, bundle: Get) -> None:
    options = ExportOptions(source=str(tiny_model("sd1")), output=Path("unused"))
    assert read_manifest(bundle("sd1")).source == resolve(options, Progress()).source

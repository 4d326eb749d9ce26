"""Bundles of ControlNets, and the graphs of UNets that add their residuals."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
import pytest
import torch
from covering import nightly_but
from img2img_export.build import export_model
from img2img_export.cli.dry_run import forecast, survey
from img2img_export.companion import plan
from img2img_export.convert import control_graph
from img2img_export.convert.fused_attention import name_of
from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions, LoraFile
from img2img_export.progress import Progress
from img2img_server.bundle.controls import CLASSES, CONTROL_LORA_NAME, CONTROL_NAME, FAMILY, is_residual
from img2img_server.bundle.image_prompts import BIAS, STATES
from img2img_server.bundle.manifest import Precision, check_bundle, read_manifest
from short_exports import brief, cut_short

Get = Callable[[str], Path]


pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.mark.parametrize("name", ["sd1-a", "sdxl-a", "sdxl-u"])
def test_a_controlnet_becomes_a_verified_bundle(name: str, control_bundle: Get) -> None:
    bundle = control_bundle(name)
    manifest = read_manifest(bundle)
    check_bundle(bundle, manifest)
    assert (manifest.family, manifest.backend, manifest.pipeline_class) == (FAMILY, "onnx", CLASSES[name.endswith("u")])
    (component,) = manifest.components
    named = {item.name: item.shape for item in component.inputs}
    assert {"sample", "timestep", "encoder_hidden_states", "controlnet_cond", "conditioning_scale"} <= named.keys()
    assert ("text_embeds" in named) == name.startswith("sdxl")
    assert ("control_mode" in named) == name.endswith("u")
    assert named["timestep"] == ("timestep_batch",)
    assert [part.case for part in manifest.verification.components] == ["random, batch 1, 8 x 8", "random, batch 3, 9 x 13"]
    assert manifest.verification.reference == "PyTorch in fp32"


@pytest.mark.parametrize("letter", ["a", "u", "x"])
def test_a_controlnet_of_flux_becomes_a_verified_bundle(letter: str, control_bundle: Get) -> None:
    bundle = control_bundle(f"flux-dev-{letter}")
    manifest = read_manifest(bundle)
    check_bundle(bundle, manifest)
    assert (manifest.family, manifest.pipeline_class) == (FAMILY, "FluxControlNetModel")
    (component,) = manifest.components
    named = {item.name: item.shape for item in component.inputs}
    assert {"hidden_states", "guidance", "controlnet_cond", "conditioning_scale"} <= named.keys()
    assert ("control_mode" in named) == (letter == "u")
    assert len(named["controlnet_cond"]) == (4 if letter == "x" else 3)
    outputs = [item.name for item in component.outputs]
    assert outputs == ["controlnet_block_samples", *(() if letter == "x" else ["controlnet_single_block_samples"])]
    assert (component.fused, component.reason) == ("", "")


def test_flux_has_control_graphs_if_they_are_asked_for(bundle: Get) -> None:
    made, plain = (
        next(part for part in read_manifest(bundle(name)).components if part.name == "transformer")
        for name in ("flux-dev:fp32:controls", "flux-dev")
    )
    assert made.reason == ""
    paths = (made.control, made.fused_control, made.control_lora, made.fused_control_lora)
    names = (CONTROL_NAME, name_of(CONTROL_NAME), CONTROL_LORA_NAME, name_of(CONTROL_LORA_NAME))
    assert paths == tuple(f"transformer/{name}" for name in names)
    assert (plain.control, plain.control_lora) == ("", "")


def test_control_graphs_of_a_family_without_controlnets_are_refused(tiny_model: Get, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match="--control-graphs: there are no ControlNets for models of the family stable-diffusion-3"
    ):
        export_model(ExportOptions(str(tiny_model("sd3")), tmp_path / "bundle", control_graphs=True))


@pytest.mark.parametrize("name", ["sd1-a fp16", *nightly_but(["sd1-a bf16", "sd1-a int8", "flux-dev-a bf16", "flux-dev-x fp16"])])
def test_precisions_of_a_controlnet(name: str, tiny_controlnet: Get, tmp_path: Path) -> None:
    net, precision = name.split()
    with brief():
        made = export_model(ExportOptions(str(tiny_controlnet(net)), tmp_path / "net", precision=cast(Precision, precision)))
    (component,) = made.manifest.components
    assert component.precision == precision
    assert component.reason == ""
    assert component.fused == ("controlnet/cuda/model.onnx" if name == "sd1-a fp16" else "")


def test_an_export_is_repeated_only_after_a_change(tiny_controlnet: Get, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_controlnet("sd1-a"), tmp_path / "source"))
    options = ExportOptions(str(source), tmp_path / "net")
    with brief():
        first, again = export_model(options), export_model(options)
        assert (first.up_to_date, again.up_to_date) == (False, True)
        assert "controlnet on onnx in fp32" in first.summary()
        assert "graphs within" in first.summary()
        shutil.copy(tiny_controlnet("sd1-b") / "diffusion_pytorch_model.safetensors", source)
        with pytest.raises(ExportError, match="--force"):
            export_model(options)


def test_dry_run_describes_the_export_of_a_controlnet(tiny_controlnet: Get, tmp_path: Path) -> None:
    options = ExportOptions(str(tiny_controlnet("sd1-a")), tmp_path / "net")
    checkpoint, contents = survey(options, Progress())
    found = forecast(checkpoint, options, plan(checkpoint.layout), contents)
    assert (found.family, found.backend) == (FAMILY, "onnx")
    ((name, kind, backend, parameters),) = [(part.name, part.kind, part.backend, part.parameters) for part in found.components]
    assert (name, kind, backend) == (FAMILY, "ControlNetModel", "onnx")
    assert parameters > 10_000
    assert found.bundle_bytes == 4 * parameters


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"loras": (LoraFile(Path("a.safetensors")),)}, "--lora"),
        ({"scheduler": "lcm"}, "--scheduler"),
        ({"backend": "torch"}, "--backend"),
        ({"allow_patterns": ("*",)}, "--allow-pattern"),
    ],
)
def test_options_that_do_not_apply_are_refused(changes: Any, flag: str, tiny_controlnet: Get, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"is a ControlNet, which becomes one graph: {flag}.* does not apply"):
        export_model(ExportOptions(str(tiny_controlnet("sd1-a")), tmp_path / "net", **changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"_class_name": "SparseControlNetModel"},
            "is a SparseControlNetModel: img2img exports the ControlNets of Stable Diffusion",
        ),
        (
            {"_class_name": "SD3ControlNetModel"},
            r"is a SD3ControlNetModel \(diffusers has no image-to-image pipeline with it to follow\): img2img",
        ),
        ({"_class_name": "UNet2DConditionModel"}, "is a UNet2DConditionModel, a component and not a model"),
        ({"_class_name": None}, "is a component and not a model"),
        ({"quantization_config": {}}, "is quantized"),
    ],
)
def test_other_components_are_refused_by_name(changes: Any, reason: str, tiny_controlnet: Get, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_controlnet("sd1-a"), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ExportError, match=reason):
        export_model(ExportOptions(str(source), tmp_path / "net"))


def test_pickled_weights_and_code_are_refused(tiny_controlnet: Get, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_controlnet("sd1-a"), tmp_path / "source"))
    (source / "model.py").write_text("")
    with pytest.raises(ExportError, match=r"contains custom code \(model\.py\)"):
        export_model(ExportOptions(str(source), tmp_path / "net"))
    (source / "model.py").unlink()
    (source / "diffusion_pytorch_model.safetensors").rename(source / "diffusion_pytorch_model.bin")
    with pytest.raises(ExportError, match="has pickled weights only"):
        export_model(ExportOptions(str(source), tmp_path / "net"))


def test_rows_without_residuals_and_image_prompts_match_the_plain_graph(bundle: Get) -> None:
    """Bit by bit, for odd sizes too. The further graphs share the weights."""
    unet = bundle("sd1") / "unet"
    component = next(part for part in read_manifest(bundle("sd1")).components if part.name == "unet")
    assert (component.control, component.control_lora) == (f"unet/{CONTROL_NAME}", f"unet/{CONTROL_LORA_NAME}")
    assert {part.graph for part in read_manifest(bundle("sd1")).verification.components} >= {"control", "control lora"}
    plain, control = (onnxruntime.InferenceSession(unet / name) for name in ("model.onnx", CONTROL_NAME))
    rng = np.random.default_rng(0)
    feed = {
        "sample": rng.standard_normal((3, 4, 9, 13), np.float32),
        "timestep": np.array([900, 500, 3], np.float32),
        "encoder_hidden_states": rng.standard_normal((3, 77, 32), np.float32),
    }
    channels = {item.name: item.shape[1] for item in control.get_inputs() if is_residual(item.name)}
    sizes = {0: (9, 13), 1: (5, 7)}
    levels = [0, 0, 1, 1, 1]
    residuals = {
        name: rng.standard_normal((3, channels[name], *sizes[level]), np.float32)
        for name, level in zip(channels, levels, strict=True)
    }
    residuals |= {STATES: rng.standard_normal((3, 2, 16, 160), np.float32), BIAS: np.zeros((3, 2, 16), np.float32)}
    for value in residuals.values():
        value[1] = 0
    (expected,), (found,) = plain.run(None, feed), control.run(None, feed | residuals)
    assert np.array_equal(found[1], expected[1])
    assert np.abs(found[0] - expected[0]).max() > 1e-2
    assert (unet / CONTROL_NAME).stat().st_size < 2 * (unet / "model.onnx").stat().st_size


def test_a_control_graph_that_differs_is_left_out_with_the_reason(
    tiny_model: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here one that forgets the middle block's residual."""
    adding = control_graph._adding

    def forgetful(unet: Any, residuals: Any) -> Any:
        is_traced = torch.onnx.is_in_onnx_export()
        return adding(unet, [*residuals[:-1], 0 * residuals[-1]] if is_traced else residuals)

    monkeypatch.setattr(control_graph, "_adding", forgetful)
    with cut_short(further=True):
        made = export_model(ExportOptions(str(tiny_model("sd1")), tmp_path / "bundle", lora_graphs=False))
    unet = next(part for part in made.manifest.components if part.name == "unet")
    assert (unet.control, unet.control_lora) == ("", "")
    assert unet.reason.startswith("no control graph: unet differs from PyTorch (")
    assert not (tmp_path / "bundle" / "unet" / CONTROL_NAME).exists()

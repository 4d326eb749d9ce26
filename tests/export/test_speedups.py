"""`--speedups`: the light graph that a UNet's graph gets, and which settings the manifest keeps."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from covering import nightly_but
from diffusers import QwenImageTransformer2DModel
from img2img_export.convert import light_graph
from img2img_export.convert.token_graphs import Layout, token_part
from img2img_export.convert.tracing import trace
from img2img_export.progress import Progress
from img2img_export.verify import speedups as measuring
from img2img_export.verify import token_cases
from img2img_export.verify.parity import compare, light_cases, open_graph
from img2img_export.verify.recorded_inputs import Calls
from img2img_server.bundle.manifest import LIMITS, read_manifest
from img2img_server.bundle.speedups import FEATURES, LIGHT_NAME, Speedup

Get = Callable[[str], Path]


def test_the_light_graph_shares_the_weights_and_has_only_the_outer_layers(bundle: Get) -> None:
    directory = bundle("sd1:fp32:speedups")
    manifest = read_manifest(directory)
    (unet,) = (part for part in manifest.components if part.name == "unet")
    assert [item.name for item in unet.outputs] == ["out_sample", FEATURES]
    assert unet.light == f"unet/{LIGHT_NAME}"
    assert unet.light in manifest.files
    whole, light = (onnx.load(directory / "unet" / name, load_external_data=False) for name in ("model.onnx", LIGHT_NAME))
    assert {item.name for item in light.graph.input} >= {"sample", "timestep", FEATURES}
    assert [item.name for item in light.graph.output] == ["out_sample"]
    counts = [sum(node.op_type == "Conv" for node in model.graph.node) for model in (whole, light)]
    # The first and the last one, three of the last residual block, and two of its attention.
    assert counts[1] == 7 < counts[0]
    places = {entry.value for item in light.graph.initializer for entry in item.external_data if entry.key == "location"}
    assert places == {"model.onnx_data"}
    checked = [part for part in manifest.verification.components if part.graph == "light"]
    assert len(checked) == 4
    assert all(part.passed and part.relative_error < 1e-4 for part in checked)


@pytest.mark.parametrize("precision", nightly_but(["fp16", "bf16", "int8"], "fp16"))
def test_the_light_graph_has_the_precision_of_the_whole_one(bundle: Get, precision: str) -> None:
    directory = bundle(f"sd1:{precision}:speedups")
    manifest = read_manifest(directory)
    (unet,) = (part for part in manifest.components if part.name == "unet")
    assert (unet.precision, unet.light) == (precision, f"unet/{LIGHT_NAME}"), unet.reason
    assert unet.fused_light == (f"unet/cuda/{LIGHT_NAME}" if precision == "fp16" else "")
    checked = {part.graph for part in manifest.verification.components if part.component == "unet" and part.passed}
    assert checked >= ({"light", "fused light"} if precision == "fp16" else {"light"})
    assert {one.cpu_times_faster for one in manifest.speedups.table} == {0.0} or precision == "int8", "emulation is not timed"


def test_a_bundle_without_the_option_has_neither(bundle: Get) -> None:
    manifest = read_manifest(bundle("sd1"))
    (unet,) = (part for part in manifest.components if part.name == "unet")
    assert (unet.light, len(unet.outputs), manifest.speedups.table) == ("", 1, ())


def test_the_manifest_says_what_was_measured(bundle: Get) -> None:
    known = read_manifest(bundle("sd1:fp32:speedups")).speedups
    assert (known.images, known.least_steps, known.most_guidance) == (3, 8, 7.5)
    assert 0 < known.light_cost < 0.5
    assert known.table
    for one in known.table:
        assert one.times_faster > 1
        assert 0 < one.psnr_db <= one.mean_psnr_db
        assert 0 < one.ssim <= one.mean_ssim <= 1


def made(times: float, psnr: float) -> Speedup:
    return dataclasses.replace(Speedup(f"{times}", 0.4, 2, True, True), times_faster=times, psnr_db=psnr)


def test_settings_that_another_one_beats_are_dropped() -> None:
    found = [made(1.2, 40), made(1.5, 35), made(1.4, 34), made(2.0, 30), made(1.5, 36), made(1.01, 60)]
    kept = [(one.times_faster, one.psnr_db) for one in measuring._best(found)]
    assert kept == [(2.0, 30), (1.5, 36), (1.2, 40)]


def test_settings_that_differ_most_are_kept() -> None:
    found = [made(2 - index / 20, 30 + index + (0.9 if index == 3 else 0)) for index in range(12)]
    kept = measuring._best(found)
    assert len(kept) == 8
    assert (kept[0], kept[-1]) == (found[0], found[-1])


@pytest.mark.parametrize(("value", "digits", "expected"), [(33.456, 2, 33.45), (0.99999, 4, 0.9999), (999.0, 2, 999.0)])
def test_bounds_are_rounded_down(value: float, digits: int, expected: float) -> None:
    assert measuring._rounded_down(value, digits) == expected


@pytest.mark.parametrize("edits", [False, True])
def test_the_light_graph_of_qwen_image_has_one_of_its_blocks(tmp_path: Path, edits: bool) -> None:
    """The texts have different lengths, which are padded in a batch; the edit model's references have a timestep of 0."""
    torch.manual_seed(1)
    module = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(8, 4, 4), zero_cond_t=edits,
    ).eval()  # fmt: skip
    module.register_to_config(_class_name=type(module).__name__)  # as if it was loaded
    part, kind = token_part("transformer", module)
    rows = [kind.example(Layout(9, ((4, 4), (2, 3))), timestep, torch.Generator()) for timestep in (0.9, 0.2)]
    example = token_cases.example(part, kind)
    assert light_graph.has_light_graph(module)
    assert 0.25 < light_graph.light_cost(module, part, example) < 0.4
    whole = light_graph.with_features(part, module)
    cases = token_cases.make_cases(whole, kind, module, Calls({}, rows=rows))
    graph = trace(module, whole, example)
    graph.write(tmp_path, Progress(), "transformer", {LIGHT_NAME: light_graph.cut(graph, module)})
    light, compared = light_cases(whole, cases)
    for description, own, file in ((whole, cases, "model.onnx"), (light, compared, LIGHT_NAME)):
        parities = compare(description, open_graph(tmp_path / file), own, LIMITS["fp32"])
        assert len(parities) == len(cases)
        assert all(parity.passed for parity in parities), file
    counts = [len(onnx.load(tmp_path / file, load_external_data=False).graph.node) for file in ("model.onnx", LIGHT_NAME)]
    assert counts[1] < counts[0] / 2

"""The LoRA graph of a component: what it computes, what it shares with the plain graph, and when there is none."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from covering import nightly_but
from img2img_export.build import export_model
from img2img_export.component import FUSED
from img2img_export.convert import lora_graph
from img2img_export.convert.external_weights import DATA_NAME, GRAPH_NAME
from img2img_export.convert.fused_attention import name_of
from img2img_export.options import ExportOptions
from img2img_server.bundle.adapters import INDEX, LORA_NAME, RANKS, TAPS, adapted_layers
from img2img_server.bundle.manifest import Component, read_manifest
from short_exports import cut_short

Get = Callable[[str], Path]

UNETS = ("sd1", "sd2", "sdxl", "refiner", "lcm:fp32:further")


def components(bundle: Path) -> dict[str, Component]:
    return {part.name: part for part in read_manifest(bundle).components}


@pytest.mark.parametrize("name", nightly_but(UNETS, *UNETS[:4]))
def test_unets_and_text_encoders_have_verified_lora_graphs(name: str, bundle: Get) -> None:
    manifest = read_manifest(bundle(name))
    compared = {part.component for part in manifest.verification.components if part.graph == "lora"}
    graphs = {part.name: part.lora for part in manifest.components if part.name == "unet" or part.name.startswith("text_encoder")}
    assert graphs == {part: f"{part}/{LORA_NAME}" for part in compared}
    assert "unet" in graphs
    assert len(graphs) >= 2


@pytest.mark.parametrize("name", nightly_but(["sd3", "flux-dev", "klein", "kontext", "qwenimage", "zimage"], "sd3", "klein"))
def test_transformers_have_verified_lora_graphs_with_and_without_fused_attention(name: str, bundle: Get) -> None:
    """A T5 has none, and neither has Kontext's CLIP, which runs in PyTorch."""
    manifest = read_manifest(bundle(name))
    compared = {(part.component, part.graph) for part in manifest.verification.components if "lora" in part.graph}
    transformer = components(bundle(name))["transformer"]
    assert transformer.lora == f"transformer/{LORA_NAME}"
    assert transformer.fused_lora == f"transformer/{name_of(LORA_NAME)}"
    clips = {"sd3": ("text_encoder", "text_encoder_2"), "flux-dev": ("text_encoder",)}
    wanted = {(clip, "lora") for clip in clips.get(name, ())}
    assert compared == {("transformer", "lora"), ("transformer", "fused lora"), *wanted}


def test_the_convolutions_of_a_unet_are_adapted(bundle: Get) -> None:
    layers = {layer.name: layer for layer in adapted_layers(inputs_of(bundle("sd1") / "unet" / LORA_NAME))}
    large = {name for name, layer in layers.items() if layer.taps == TAPS}
    assert {name.rpartition(".")[2] for name in large} == {"conv1", "conv2", "conv", "conv_in", "conv_out"}
    assert any(name.endswith("conv_shortcut") for name in layers.keys() - large)


@pytest.mark.parametrize("name", ["kandinsky22"])
def test_other_families_have_no_lora_graphs(name: str, bundle: Get) -> None:
    assert not any(part.lora for part in components(bundle(name)).values())


def inputs_of(graph: Path) -> dict[str, list[int | str]]:
    inputs = onnx.load(str(graph), load_external_data=False).graph.input
    return {item.name: [axis.dim_param or axis.dim_value for axis in item.type.tensor_type.shape.dim] for item in inputs}


def opened(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("rank", [1, 16, 64])
def test_rows_without_a_lora_equal_the_plain_graph_bitwise(rank: int, bundle: Get) -> None:
    """In any batch, and at any rank. A row with a LoRA has the same bits in any batch, and with its rank padded further."""
    plain, lora = (opened(bundle("sd1") / "unet" / file) for file in (GRAPH_NAME, LORA_NAME))
    layers = adapted_layers({item.name: list(item.shape) for item in lora.get_inputs()})
    rng = np.random.default_rng(0)
    width = next(item.shape[2] for item in plain.get_inputs() if item.name == "encoder_hidden_states")
    feed = {
        "sample": rng.standard_normal((4, 4, 9, 13), np.float32),
        "timestep": np.array([900, 500, 20, 1], np.float32),
        "encoder_hidden_states": rng.standard_normal((4, 7, width), np.float32),
    }

    def matrices(padded: int, adapters: int = 3) -> dict[str, Any]:
        rng = np.random.default_rng(1)
        made = {}
        for layer in layers:
            for name, shape, axis in (
                (layer.down_input, layer.down_shape(adapters, rank), 1 if layer.is_conv else 2),
                (layer.up_input, layer.up_shape(adapters, rank), 2 if layer.is_conv else 1),
            ):
                values = rng.standard_normal(shape, np.float32) * 0.2
                values[0] = 0
                added = (padded - rank) * (layer.taps if name == layer.down_input else 1)
                made[name] = np.pad(values, [(0, added if one == axis else 0) for one in range(3)])
        return made

    expected = plain.run(None, feed)[0]
    index = np.array([0, 1, 2, 0])
    found = lora.run(None, {**feed, **matrices(max(rank, RANKS[0])), INDEX: index})[0]
    for row in (0, 3):
        assert np.array_equal(found[row], expected[row])
    for row in (1, 2):
        assert np.abs(found[row] - expected[row]).max() > 1e-3
        alone = {name: value[row : row + 1] for name, value in feed.items()}
        assert np.array_equal(lora.run(None, {**alone, **matrices(RANKS[-1]), INDEX: index[row : row + 1]})[0][0], found[row])


@pytest.mark.parametrize("precision", nightly_but(["fp32", "fp16", "bf16"], "fp32"))
def test_both_graphs_share_one_file_of_weights(precision: str, bundle: Get, tiny_model: Get, tmp_path: Path) -> None:
    exported = {False: bundle("sd1:fp32:speedups"), True: bundle("sd1")}
    if precision != "fp32":
        with cut_short(further=True):
            for graphs in exported:
                options = ExportOptions(str(tiny_model("sd1")), tmp_path / str(graphs), lora_graphs=graphs)
                exported[graphs] = export_model(replace(options, precision=precision)).path  # type: ignore[arg-type]
    for name in ("unet", "text_encoder"):
        sizes = [(path / name / DATA_NAME).stat().st_size for path in exported.values()]
        assert sizes[1] <= sizes[0] + 4096
    assert not any(part.lora or part.fused_lora for part in components(exported[False]).values())
    unet = components(exported[True])["unet"]
    assert unet.lora == f"unet/{LORA_NAME}"
    assert unet.fused_lora == (f"unet/{FUSED}/{LORA_NAME}" if precision == "fp16" else "")
    if unet.fused_lora:
        fused, adapted = (onnx.load(exported[True] / path, load_external_data=False) for path in (unet.fused, unet.fused_lora))
        kinds = [{node.op_type for node in model.graph.node if node.domain == "com.microsoft"} for model in (fused, adapted)]
        assert kinds[0] == kinds[1]
        sizes = [(path / "unet" / FUSED / DATA_NAME).stat().st_size for path in exported.values()]
        assert sizes[1] <= sizes[0] + 4096


def test_wrong_lora_graph_is_omitted_with_the_reason(tiny_model: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = lora_graph._product
    monkeypatch.setattr(lora_graph, "_product", lambda *arguments: right(*arguments) * 1.01)
    with cut_short(further=True, controls=False):
        manifest = export_model(ExportOptions(str(tiny_model("sd1")), tmp_path / "out")).manifest
    (unet,) = (part for part in manifest.components if part.name == "unet")
    assert unet.lora == ""
    assert unet.reason.startswith("no lora graph: unet differs from PyTorch (")
    assert f"unet/{LORA_NAME}" not in manifest.files
    assert manifest.verification.passed

"""The exported graphs: each is held against diffusers. (tests/oracle holds bundles against optimum's own pipeline.)"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from conftest import COMPARED, OF_TWO_SIZES
from diffusers import UNet2DConditionModel
from img2img_server.bundle.manifest import read_manifest

Get = Callable[[str], Path]

STABLE_DIFFUSION = ["sd1", "sd2", "sdxl", "refiner"]


@pytest.fixture(scope="module")
def unet(bundle: Get) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(bundle("sd1") / "unet" / "model.onnx", providers=["CPUExecutionProvider"])


def inputs(batch: int, height: int, width: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(batch)
    return {
        "sample": random.standard_normal((batch, 4, height, width), dtype=np.float32),
        "timestep": np.linspace(1, 999, batch, dtype=np.float32),
        "encoder_hidden_states": random.standard_normal((batch, 77, 32), dtype=np.float32),
    }


def test_each_sample_has_its_own_timestep(unet: onnxruntime.InferenceSession) -> None:
    batch = inputs(3, 8, 8)
    (together,) = unet.run(None, batch)
    alone = [unet.run(None, {name: value[row : row + 1] for name, value in batch.items()})[0] for row in range(3)]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-5, atol=1e-5)
    (same_timestep,) = unet.run(None, {**batch, "timestep": np.full(3, 1, np.float32)})
    assert np.abs(same_timestep[2] - together[2]).max() > 0.01, "the timestep must matter for this test to mean anything"


def test_a_single_timestep_serves_the_whole_batch(unet: onnxruntime.InferenceSession) -> None:
    batch = inputs(3, 8, 8)
    (one,) = unet.run(None, {**batch, "timestep": np.array([401], np.float32)})
    (many,) = unet.run(None, {**batch, "timestep": np.full(3, 401, np.float32)})
    np.testing.assert_allclose(one, many, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 7), (9, 12), (10, 6), (16, 8), (33, 3)])
def test_graph_accepts_every_size_that_torch_accepts(
    unet: onnxruntime.InferenceSession, tiny_model: Get, height: int, width: int
) -> None:
    module = UNet2DConditionModel.from_pretrained(tiny_model("sd1") / "unet", use_safetensors=True)
    batch = inputs(2, height, width)
    with torch.no_grad():
        expected = module(**{name: torch.from_numpy(value) for name, value in batch.items()}).sample.numpy()
    np.testing.assert_allclose(unet.run(None, batch)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "folder"), [("sd1", "text_encoder"), ("sdxl", "text_encoder_2"), ("sd3", "text_encoder_3")])
@pytest.mark.parametrize(("rows", "length"), [(1, 77), (3, 10), (2, 1)])
def test_text_encoder_graph_accepts_any_length(
    name: str, folder: str, rows: int, length: int, bundle: Get, tiny_model: Get
) -> None:
    """Traced at one length, a causal mask or a table of relative positions must not be frozen."""
    kind = getattr(transformers, json.loads((tiny_model(name) / folder / "config.json").read_text())["architectures"][0])
    module = kind.from_pretrained(tiny_model(name) / folder, use_safetensors=True).eval()
    ids = torch.randint(3, module.config.vocab_size - 1, (rows, length), generator=torch.Generator().manual_seed(rows))
    session = onnxruntime.InferenceSession(bundle(name) / folder / "model.onnx", providers=["CPUExecutionProvider"])
    (actual,) = session.run(["last_hidden_state"], {"input_ids": ids.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(actual, module(ids).last_hidden_state.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", STABLE_DIFFUSION)
def test_manifest_lists_graph_inputs(name: str, bundle: Get) -> None:
    manifest = read_manifest(bundle(name))
    components = {component.name: component for component in manifest.components}
    encoders = {"sdxl": {"text_encoder", "text_encoder_2"}, "refiner": {"text_encoder_2"}}.get(name, {"text_encoder"})
    assert set(components) == {"unet", "vae_encoder", "vae_decoder"} | encoders
    for component in components.values():
        session = onnxruntime.InferenceSession(bundle(name) / component.name / "model.onnx")
        assert [item.name for item in component.inputs] == [item.name for item in session.get_inputs()]
        assert [item.name for item in component.outputs] == [item.name for item in session.get_outputs()]
        assert (component.precision, component.opset) == ("fp32", 18)
    shapes: dict[str, Any] = {item.name: item.shape for item in components["unet"].inputs}
    assert shapes["sample"] == ("batch_size", 4, "height", "width")
    assert shapes["timestep"] == ("timestep_batch",)
    if "sdxl" in name or name == "refiner":
        assert shapes["time_ids"] == ("batch_size", 5 if name == "refiner" else 6)


@pytest.mark.parametrize("name", [*STABLE_DIFFUSION, "kandinsky22"])
def test_every_comparison_was_made_and_passed(name: str, bundle: Get) -> None:
    manifest = read_manifest(bundle(name))
    verification = manifest.verification
    assert verification.passed
    assert len(verification.pictures) == (6 if name in COMPARED else 2)
    graphs = {part.name for part in manifest.components if part.backend == "onnx"}
    assert {part.component for part in verification.components} == graphs
    for graph in graphs:
        cases = [part.case for part in verification.components if part.component == graph]
        controlled = [case for case in cases if ", residuals" in case]
        assert len(controlled) == (2 if name in STABLE_DIFFUSION and graph == "unet" else 0), "without and with LoRAs"
        cases = [case for case in cases if case not in controlled]
        with_loras = [case for case in cases if case.endswith(", LoRAs")]
        adapted = name in STABLE_DIFFUSION and (graph == "unet" or graph.startswith("text_encoder"))
        assert len(with_loras) == (2 if adapted else 0), "one real, one random"
        cases = [case for case in cases if case not in with_loras]
        kinds = [(kind, batch) for kind in ("real", "random") for batch in (1, 3)]
        assert len(cases) == len(kinds)
        assert all(any(f"{kind}, batch {batch}, " in case for case in cases) for kind, batch in kinds)
        sizes = {case.rpartition(", ")[2] for case in cases}
        assert len(sizes) > 1 or graph.startswith("text_encoder") or name not in (*COMPARED, *OF_TWO_SIZES)
    if name in STABLE_DIFFUSION:
        assert any("9 x 13" in part.case for part in verification.components)
    assert all(part.passed for part in verification.components)
    assert all(part.passed for part in verification.pictures)


@pytest.mark.parametrize("name", ["sd1", "kandinsky22"])
def test_configurations_contain_no_local_path(name: str, bundle: Get, tiny_model: Get) -> None:
    for path in bundle(name).rglob("*.json"):
        if path.name == "manifest.json":
            continue
        text = path.read_text(encoding="utf-8")
        assert "_name_or_path" not in json.loads(text), path
        assert str(tiny_model(name).parent) not in text, path
        assert str(bundle(name).parent) not in text, path


@pytest.mark.parametrize("name", ["sd1", "kandinsky22"])
def test_bundle_files_are_world_readable(name: str, bundle: Get) -> None:
    for path in (bundle(name), *bundle(name).rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path
        assert not path.is_symlink()

"""A transformer's second graph: attention is one operator, and the weights are those of the plain graph."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from img2img_export import component
from img2img_export.build import export_model
from img2img_export.convert.fused_attention import NAME
from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions
from img2img_server.bundle.manifest import read_manifest
from short_exports import cut_short

ATTENTIONS = {"klein": 2, "sd3-no-t5": 2, "flux-dev": 3}
"""Tiny models, and the attention layers of their transformers."""


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_one_operator_and_weights_are_shared(name: str, bundle: Callable[[str], Path]) -> None:
    manifest = read_manifest(bundle(name))
    (transformer,) = [part for part in manifest.components if part.name == "transformer"]
    assert transformer.fused == f"transformer/{NAME}"
    assert transformer.fused in manifest.files
    compared = [parity for parity in manifest.verification.components if parity.component == "transformer"]
    cases = Counter(parity.graph for parity in compared if parity.passed)
    assert cases["fused"] == cases["plain"] >= 4

    folder = bundle(name) / "transformer"
    plain, fused = (onnx.load(str(folder / file), load_external_data=False) for file in ("model.onnx", NAME))
    kinds = Counter(node.op_type for node in fused.graph.node)
    assert kinds["MultiHeadAttention"] == ATTENTIONS[name]
    assert not kinds["Softmax"]
    weights = {item.name: item.SerializeToString() for item in plain.graph.initializer}
    assert {item.name: item.SerializeToString() for item in fused.graph.initializer}.items() <= weights.items()
    assert [path.name for path in folder.glob("*data")] == ["model.onnx_data"]


def test_any_number_of_tokens_is_taken(bundle: Callable[[str], Path]) -> None:
    """The tracer knows the operator's result only by its size in the example."""
    (transformer,) = [part for part in read_manifest(bundle("flux-dev")).components if part.name == "transformer"]
    random = np.random.default_rng(1)
    sizes = {"batch_size": 1, "image_tokens": 700, "text_tokens": 90}
    shapes = {item.name: [size if isinstance(size, int) else sizes[size] for size in item.shape] for item in transformer.inputs}
    inputs = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    folder = bundle("flux-dev") / "transformer"
    sessions = [onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"]) for file in ("model.onnx", NAME)]
    plain, fused = (session.run(None, inputs)[0] for session in sessions)
    np.testing.assert_allclose(fused, plain, atol=1e-4)


def test_transformer_without_fused_attention_has_a_reason(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise ExportError("it was refused")

    monkeypatch.setattr(component, "write_beside", refuse)
    with cut_short():
        outcome = export_model(ExportOptions(source=str(tiny_model("klein")), output=tmp_path / "out"))
    (transformer,) = [part for part in outcome.manifest.components if part.name == "transformer"]
    assert not transformer.fused
    assert transformer.reason == "no fused graph: ExportError: it was refused"
    assert not (tmp_path / "out" / "transformer" / NAME).exists()

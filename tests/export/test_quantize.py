"""int8 graphs: the numbers of quantize_dynamic, near PyTorch's, and weights quantized one at a time."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from img2img_export.convert import quantize
from img2img_export.convert.external_weights import ExternalWeightsGraph, Weight
from img2img_export.convert.parts import Part, Tensors, denoiser_part, flatten, text_part
from img2img_export.convert.tracing import trace
from img2img_export.progress import Progress
from onnx import NodeProto, TensorProto, helper
from onnxruntime.quantization import QuantType, quantize_dynamic

pytestmark = pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based:DeprecationWarning")

Traced = tuple[Tensors, Tensors, ExternalWeightsGraph]


@pytest.fixture(scope="module")
def pipe(tiny_model: Callable[[str], Path]) -> Any:
    from diffusers import AutoPipelineForImage2Image

    return AutoPipelineForImage2Image.from_pretrained(tiny_model("sd1"), use_safetensors=True)


def finish(module: Any, part: Part, example: Tensors) -> Traced:
    with torch.no_grad():
        return example, part.call(module, example), trace(module, part, example)


@pytest.fixture(scope="module")
def text(pipe: Any) -> Traced:
    """The text encoder: inputs, outputs and fp32 graph."""
    example = {"input_ids": torch.randint(0, 200, (2, 77), generator=torch.Generator().manual_seed(0))}
    return finish(pipe.text_encoder, text_part("text_encoder", pipe.text_encoder, hidden_states=False), example)


@pytest.fixture(scope="module")
def unet(pipe: Any) -> Traced:
    """The UNet, likewise."""
    generator = torch.Generator().manual_seed(0)
    call = {"sample": torch.randn(2, 4, 17, 19, generator=generator), "timestep": torch.tensor([5.0, 907.0])}
    call["encoder_hidden_states"] = torch.randn(2, 77, pipe.unet.config.cross_attention_dim, generator=generator)
    part = denoiser_part("unet", pipe.unet, [call, {**call, "sample": call["sample"][:, :, 8:, 8:]}], call)
    return finish(pipe.unet, part, flatten(call))


def run(path: Path, inputs: Tensors, optimized: Path | None = None) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if optimized:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {name: value.numpy() for name, value in inputs.items()}))


def relative_error(value: Any, reference: Any) -> float:
    return float(np.linalg.norm(value - np.asarray(reference)) / np.linalg.norm(np.asarray(reference)))


@pytest.mark.parametrize(("name", "limit"), [("text", 0.05), ("unet", 0.03)])
def test_int8_graph_is_close_to_torch_and_smaller(
    name: str, limit: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    inputs, outputs, graph = request.getfixturevalue(name)
    result = quantize.to_int8(graph)
    result.write(tmp_path, Progress(), name)
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)

    values = run(tmp_path / "model.onnx", inputs)

    assert result.bytes < graph.bytes
    assert any(node.op_type == "MatMulInteger" for node in result.model.graph.node)
    for value, reference in zip(values, outputs.values(), strict=True):
        assert 1e-6 < relative_error(value, reference) < limit


def test_results_match_onnx_runtimes_quantize_dynamic(text: Traced, tmp_path: Path) -> None:
    inputs, _, graph = text
    graph.write(tmp_path / "plain", Progress(), "plain")
    quantize.to_int8(graph).write(tmp_path / "ours", Progress(), "ours")
    theirs = tmp_path / "theirs.onnx"
    settings = {"op_types_to_quantize": ["MatMul"], "per_channel": True, "reduce_range": True, "weight_type": QuantType.QInt8}
    quantize_dynamic(str(tmp_path / "plain" / "model.onnx"), str(theirs), **settings)

    pairs = zip(run(tmp_path / "ours" / "model.onnx", inputs), run(theirs, inputs), strict=True)

    assert all(relative_error(value, reference) < 1e-4 for value, reference in pairs)


def test_onnx_runtime_fuses_the_products(text: Traced, tmp_path: Path) -> None:
    inputs, _, graph = text
    quantize.to_int8(graph).write(tmp_path, Progress(), "text")

    run(tmp_path / "model.onnx", inputs, tmp_path / "optimized.onnx")

    found = {node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx"), load_external_data=False).graph.node}
    assert found & {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    assert "MatMulInteger" not in found


def test_weights_are_quantized_one_at_a_time(text: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, graph = text
    alive: list[weakref.ref[torch.Tensor]] = []
    counts: list[int] = []

    def counted(read: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
        def wrapper(self: Any) -> torch.Tensor:
            counts.append(sum(reference() is not None for reference in alive))
            value = read(self)
            if value.data_ptr() != self.source.data_ptr():
                alive.append(weakref.ref(value))
            return value

        return wrapper

    for kind in (Weight, quantize.Quantized, quantize.Scales):
        monkeypatch.setattr(kind, "read", counted(kind.read))
    result = quantize.to_int8(graph)
    assert not counts
    result.write(tmp_path, Progress(), "text")

    assert len(counts) == len(result.weights)
    assert max(counts) == 0


def test_weights_are_symmetric_for_each_channel() -> None:
    source = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    source[:, 3] = 0
    source = source.t().contiguous()
    whole = quantize.Quantized(source, torch.int8, (48, 32), (1, 0)).read()
    scales = quantize.Scales(source, torch.float32, (32,), (1, 0)).read()

    assert whole.abs().amax(dim=0).tolist() == [0 if column == 3 else 64 for column in range(32)]
    assert ((whole * scales - source.t()).abs() <= scales / 2 * 1.001).all()


@pytest.mark.parametrize(("name", "count"), [("/module/blocks.0/norm1/linear/Gemm", 1), ("/module/time_embedding/Gemm", 0)])
def test_gemm_with_a_bias_is_quantized(name: str, count: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, value = (torch.randn(*shape, generator=generator) for shape in ((96, 64), (96,), (2, 64)))
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name, transB=1)
    graph = helper.make_graph([node], "g", [tensor("x", 2, 64)], [tensor("y", 2, 96)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    external = ExternalWeightsGraph(
        model, {key: Weight.of(source, torch.float32) for key, source in (("w", weight), ("b", bias))}
    )

    result = quantize.to_int8(external)
    result.write(tmp_path, Progress(), "gemm")

    assert sum(node.op_type == "MatMulInteger" for node in result.model.graph.node) == count
    assert relative_error(run(tmp_path / "model.onnx", {"x": value})[0], torch.nn.functional.linear(value, weight, bias)) < 0.02


def test_only_chosen_products_are_quantized(text: Traced) -> None:
    def chosen(node: NodeProto, matrix: Weight) -> bool:
        return "fc1" in node.name

    nodes = quantize.to_int8(text[2], chosen).model.graph.node
    assert {node.name for node in nodes if node.op_type == "MatMulInteger"} == {
        f"/module/encoder/layers.{index}/mlp/fc1/MatMul_quant" for index in range(2)
    }


def tensor(name: str, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

"""Weight-only quantization: ONNX Runtime's own numbers, one matrix at a time, in every graph of a component, judged by images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from covering import nightly_but
from img2img_export import component
from img2img_export.build import export_model
from img2img_export.convert import weight_only
from img2img_export.convert.external_weights import ExternalWeightsGraph, Weight
from img2img_export.convert.weight_only import OPERATOR, quantize_layers, to_weight_only
from img2img_export.errors import ExportError
from img2img_export.options import GROUP_SIZES, ExportOptions
from img2img_export.progress import Progress
from img2img_export.verify import images
from img2img_export.verify.parity import open_graph
from img2img_server.bundle.manifest import AccuracyLimits, WeightFormat, limits_of, read_manifest
from img2img_server.runtime.common.weight_only import BITS, WeightOnlyLinear
from img2img_server.runtime.loader import load_pipeline
from onnx import TensorProto, helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer
from short_exports import cut_short, short_speedups

Get = Callable[[str], Path]
FORMATS: list[WeightFormat] = ["int8", "int4"]
ROWS, COLUMNS = 100, 48
"""A matrix whose columns do not divide into whole blocks."""
ERRORS = {"int8": 0.02, "int4": 0.2}


def layer(dtype: torch.dtype = torch.float32, gemm: bool = False) -> tuple[torch.Tensor, ExternalWeightsGraph]:
    """A product with a matrix [K, N] that is stored as [N, K], as torch's linear layers are; with `gemm` and a bias."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(COLUMNS, ROWS, generator=generator)
    kind = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}[dtype]
    weight = Weight.of(stored, dtype)
    if gemm:
        node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], "/norm/linear/Gemm", transB=1)
        weights = {"w": weight, "b": Weight.of(torch.randn(COLUMNS, generator=generator), dtype)}
    else:
        node, weights = helper.make_node("MatMul", ["x", "w"], ["y"], "/linear/MatMul"), {"w": weight.transposed((1, 0))}
    values = [helper.make_tensor_value_info(name, kind, ["rows", size]) for name, size in (("x", ROWS), ("y", COLUMNS))]
    graph = helper.make_graph([node], "layer", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return stored.t(), ExternalWeightsGraph(model, weights)


def written(graph: ExternalWeightsGraph, folder: Path) -> dict[str, np.ndarray]:
    """Writes the graph, and reads its constants."""
    graph.write(folder, Progress(), "layer")
    model = onnx.load(str(folder / "model.onnx"))
    return {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_values_match_onnx_runtimes_quantizer(weight_format: WeightFormat, group_size: int, tmp_path: Path) -> None:
    matrix, graph = layer()
    bits = BITS[weight_format]
    config = DefaultWeightOnlyQuantConfig(block_size=group_size, is_symmetric=False, bits=bits)
    expected = DefaultWeightOnlyQuantizer(config).qbits_block_quant(matrix.contiguous().numpy())
    found = written(to_weight_only(graph, weight_format, group_size), tmp_path)
    for part, value in zip(("quantized", "scales", "zero_points"), expected, strict=True):
        assert np.array_equal(found[f"w_{part}"].reshape(-1), value.reshape(-1)), part


@pytest.mark.parametrize("gemm", [False, True], ids=["MatMul", "Gemm"])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_quantized_products_are_close_and_rows_do_not_affect_each_other(
    weight_format: WeightFormat, gemm: bool, tmp_path: Path
) -> None:
    matrix, graph = layer(gemm=gemm)
    to_weight_only(graph, weight_format, 32).write(tmp_path, Progress(), "layer")
    given = torch.randn(5, ROWS, generator=torch.Generator().manual_seed(1))
    expected = given @ matrix + (graph.weights["b"].read() if gemm else 0)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    together = session.run(None, {"x": given.numpy()})[0]
    error = np.linalg.norm(together - expected.numpy()) / np.linalg.norm(expected.numpy())
    assert 1e-4 < error < ERRORS[weight_format]
    given[1:] *= 100
    assert np.array_equal(session.run(None, {"x": given.numpy()})[0][0], together[0])


def test_comparison_computes_as_the_server_does(tmp_path: Path) -> None:
    """With activations in int8, which ONNX Runtime supports for packed weights only."""
    _, graph = layer()
    to_weight_only(graph, "int8", 32).write(tmp_path, Progress(), "layer")
    given = {"x": np.random.default_rng(0).standard_normal((3, ROWS), np.float32)}
    server = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert np.array_equal(open_graph(tmp_path / "model.onnx").run(None, given)[0], server.run(None, given)[0])


def test_weights_in_half_precision_are_compared_in_exact_arithmetic(tmp_path: Path) -> None:
    """As on a GPU, only the weights are quantized."""
    _, graph = layer(torch.float16)
    found = written(to_weight_only(graph, "int8", 32), tmp_path)
    blocks = found["w_quantized"].reshape(COLUMNS, -1, 32).astype(np.float64)
    scales, zeros = found["w_scales"].reshape(COLUMNS, -1, 1), found["w_zero_points"].reshape(COLUMNS, -1, 1)
    assert scales.dtype == np.float16
    weights = ((blocks - zeros) * scales.astype(np.float64)).reshape(COLUMNS, -1)[:, :ROWS]
    given = np.random.default_rng(0).standard_normal((3, ROWS)).astype(np.float16)
    expected = (given.astype(np.float64) @ weights.T).astype(np.float16)
    result = open_graph(tmp_path / "model.onnx").run(None, {"x": given.astype(np.float32)})[0]
    assert np.abs(result - expected.astype(np.float32)).max() <= 0.02


def test_one_matrix_is_quantized_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[Any] = []
    held: list[int] = []
    quantize = weight_only._Blocks._quantize

    def noted(self: Any) -> Any:
        blocks.append(self)
        held.append(sum(bool(other._kept) for other in blocks))
        return quantize(self)

    monkeypatch.setattr(weight_only._Blocks, "_quantize", noted)
    matrices = [torch.randn(64, 64) for _ in range(4)]
    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"], f"/{i}/MatMul") for i in range(4)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in ("x0", "x4")]
    model = helper.make_model(helper.make_graph(nodes, "layers", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 18)])
    graph = ExternalWeightsGraph(model, {f"w{i}": Weight.of(matrix, torch.float32) for i, matrix in enumerate(matrices)})
    to_weight_only(graph, "int4", 32).write(tmp_path, Progress(), "layers")
    assert held == [0, 0, 0, 0]
    assert not any(other._kept for other in blocks)


@pytest.mark.parametrize("name", ["klein:fp16:int4", *nightly_but(["sd3:fp32:int8", "flux-dev:bf16:int4"])])
def test_bundle_has_quantized_transformer_in_all_its_graphs_and_is_verified(name: str, bundle: Get) -> None:
    _, precision, weight_format = name.split(":")
    manifest = read_manifest(bundle(name))
    part = next(part for part in manifest.components if part.name == "transformer")
    assert (part.precision, part.weight_format, manifest.weight_format) == (precision, weight_format, weight_format)
    for path in ("transformer/model.onnx", part.fused, part.lora, part.fused_lora):
        graph = onnx.load(str(bundle(name) / path), load_external_data=False).graph
        assert sum(node.op_type == OPERATOR for node in graph.node) > 5, path
    assert manifest.verification.passed
    limits = limits_of(part.precision, weight_format)  # type: ignore[arg-type]
    assert manifest.verification.limits["psnr_db"] == limits.psnr_db
    assert all(image.psnr_db >= limits.psnr_db for image in manifest.verification.pictures)
    assert {graph.graph for graph in manifest.verification.components} >= {"plain", "fused", "lora"}
    texts = [part for part in manifest.components if part.name.startswith("text_encoder")]
    assert {(part.backend, part.precision, part.weight_format) for part in texts} == {("onnx", precision, weight_format)}


@pytest.mark.nightly  # test_bundle_has_quantized_transformer_in_all_its_graphs_and_is_verified always runs
def test_light_graph_has_quantized_weights(tiny_model: Get, tmp_path: Path) -> None:
    options = ExportOptions(
        str(tiny_model("klein")), tmp_path / "out", precision="fp16", weight_format="int4", lora_graphs=False, speedups=True
    )
    with cut_short(1), short_speedups():
        manifest = export_model(options).manifest
    part = next(part for part in manifest.components if part.name == "transformer")
    assert part.weight_format == "int4"
    graph = onnx.load(str(tmp_path / "out" / part.light), load_external_data=False).graph
    quantized = {node.output[0] for node in graph.node if node.op_type == OPERATOR}
    assert quantized
    assert quantized <= {value.name for value in graph.value_info}, "else the comparison does not round them"
    assert manifest.speedups.table


def test_images_that_differ_too_much_are_tried_with_more_bits(
    tiny_model: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph, too: the text encoder of Stable Diffusion is the only one that is quantized."""
    compare, tried = images.measure, []

    def strict(name: str, image: Any, reference: Any, precision: Any = "fp32", weight_format: WeightFormat = "") -> Any:
        tried.append(weight_format)
        found = compare(name, image, reference, precision, weight_format)
        return found if not weight_format else type(found)(found.case, 255, 0.0, False)

    monkeypatch.setattr(images, "measure", strict)
    with cut_short(1):
        options = ExportOptions(str(tiny_model("sd1")), tmp_path / "out", weight_format="int4", lora_graphs=False)
        manifest = export_model(options).manifest
    assert list(dict.fromkeys(tried)) == ["int4", "int8", ""]
    text = next(part for part in manifest.components if part.name == "text_encoder")
    assert (text.weight_format, manifest.weight_format) == ("", "")
    assert text.reason == "images differ too much with weights in int4"
    assert manifest.options["weight_format"] == "int4"


def test_graphs_that_differ_too_much_have_more_bits(tiny_model: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def strict(precision: Any, weight_format: WeightFormat = "") -> AccuracyLimits:
        found = limits_of(precision, weight_format)
        return AccuracyLimits(1e-9, 1e-9, 0, 0.0, 0.0) if weight_format == "int4" else found

    monkeypatch.setattr(component, "limits_of", strict)
    with cut_short(1):
        options = ExportOptions(str(tiny_model("sd1")), tmp_path / "out", weight_format="int4", lora_graphs=False)
        manifest = export_model(options).manifest
    text = next(part for part in manifest.components if part.name == "text_encoder")
    assert text.weight_format == "int8"
    assert text.reason.startswith("not in int4: text_encoder differs from PyTorch")


def test_weights_of_int8_graphs_are_not_quantized_again(tiny_model: Get, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--weight-format is for weights of graphs that compute in fp32, fp16 or bf16"):
        export_model(ExportOptions(str(tiny_model("sd1")), tmp_path / "out", precision="int8", weight_format="int4"))


def test_weights_of_a_controlnet_are_not_quantized(tiny_controlnet: Get, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"--weight-format applies to .* is a single component"):
        export_model(ExportOptions(str(tiny_controlnet("sd1-a")), tmp_path / "out", weight_format="int8"))


def test_server_draws_with_quantized_weights(bundle: Get) -> None:
    """The images that the export compared, on the CPU provider, which computes in another way than the comparison."""
    from img2img_server.runtime import accuracy_check

    path = bundle("klein:fp16:int4")
    manifest = read_manifest(path)
    least = accuracy_check.least_psnr_db("fp16", manifest.weight_format)
    assert accuracy_check.judge(load_pipeline(path, manifest), path, manifest, least).passed


def test_layers_of_text_encoders_in_pytorch_are_quantized(bundle: Get) -> None:
    """Weights of a hybrid. The server computes with them in fp32, as the export did for its comparison."""
    path = bundle("klein:fp16:int4+hybrid")
    manifest = read_manifest(path)
    part = next(part for part in manifest.components if part.name == "text_encoder")
    assert (part.backend, part.precision, part.weight_format) == ("torch", "fp16", "int4")
    pipeline: Any = load_pipeline(path, manifest)
    module = pipeline._pipe.text_encoder
    layers = [layer for layer in module.modules() if isinstance(layer, WeightOnlyLinear)]
    assert len(layers) == 28 * 7
    assert not any(type(layer) is torch.nn.Linear for layer in module.modules())
    stored = layers[0]
    assert (stored.packed.dtype, stored.scales.dtype, module.dtype) == (torch.uint8, torch.float16, torch.float32)
    logits = 2 * module.config.vocab_size * module.config.hidden_size  # which the server leaves out
    assert part.bytes == sum(value.nbytes for value in module.parameters()) + logits


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_quantized_layer_has_the_numbers_of_the_quantized_product(weight_format: WeightFormat, bias: bool) -> None:
    """The values of ONNX Runtime's quantizer, also with columns that do not divide into whole blocks."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(ROWS, COLUMNS, bias=bias)
    module = torch.nn.Sequential(linear)
    given, weight = torch.randn(3, ROWS), linear.weight.detach().clone()
    plain = module(given)
    quantize_layers(module, weight_format, 32)
    found: Any = module[0]
    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=False, bits=BITS[weight_format])
    packed, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(weight.t().contiguous().numpy())
    assert np.array_equal(found.packed.numpy().reshape(-1), packed.reshape(-1))
    assert np.array_equal(found.scales.numpy().reshape(-1), scales.reshape(-1))
    assert np.array_equal(found.zero_points.numpy().reshape(-1), zeros.reshape(-1))
    error = float((found.weights() - weight).abs().max() / weight.abs().max())
    assert 0 < error < (1.1 / 2**8 if weight_format == "int8" else 1.1 / 2**4)
    assert float((module(given) - plain).detach().norm() / plain.detach().norm()) < ERRORS[weight_format]


def test_text_encoders_in_pytorch_are_tried_with_more_bits(
    tiny_model: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = images.measure

    def strict(name: str, image: Any, reference: Any, precision: Any = "fp32", weight_format: WeightFormat = "") -> Any:
        found = compare(name, image, reference, precision, weight_format)
        return found if weight_format != "int4" else type(found)(found.case, 255, 0.0, False)

    monkeypatch.setattr(images, "measure", strict)
    with cut_short(1):
        options = ExportOptions(
            str(tiny_model("klein")), tmp_path / "out", backend="hybrid", weight_format="int4", lora_graphs=False
        )
        manifest = export_model(options).manifest
    parts = {part.name: part for part in manifest.components}
    assert (parts["text_encoder"].weight_format, parts["transformer"].weight_format) == ("int8", "int8")
    assert parts["text_encoder"].reason == "images differ too much with weights in int4"
    pipeline: Any = load_pipeline(tmp_path / "out", manifest)
    assert {layer.bits for layer in pipeline._pipe.text_encoder.modules() if isinstance(layer, WeightOnlyLinear)} == {8}

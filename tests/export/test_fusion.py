"""Fused graphs: the architecture's number of fusions, the same results, and no weight in memory during the fusion."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from img2img_export.convert.emulation import open_beside
from img2img_export.convert.external_weights import ExternalWeightsGraph, Weight
from img2img_export.convert.fusion import DOMAIN, _Optimizer, fuse
from img2img_export.convert.parts import Part, Tensors, denoiser_part, flatten, vae_parts
from img2img_export.convert.tracing import convert, trace
from img2img_export.progress import Progress
from img2img_export.verify.contrib_functions import expanded, open_expanded
from onnx import TensorProto, helper
from onnxruntime.transformers.onnx_model_unet import UnetOnnxModel
from torch.nn import functional

pytestmark = pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based:DeprecationWarning")
Traced = tuple[Any, Part, Tensors, ExternalWeightsGraph]


def build_unet(*widths: int) -> Any:
    """A UNet with attention at its first width only."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=16,
            block_out_channels=widths,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", *["DownBlock2D"] * (len(widths) - 1)),
            up_block_types=(*["UpBlock2D"] * (len(widths) - 1), "CrossAttnUpBlock2D"),
            attention_head_dim=8,
            cross_attention_dim=64,
        ).eval()


@pytest.fixture(scope="module")
def unet() -> Traced:
    """Module, part, inputs and fp16 graph with SD 1.5's first widths, which the CUDA kernels require."""
    return traced(build_unet(320, 640), "unet")


@pytest.fixture(scope="module")
def pipe(tiny_model: Callable[[str], Path]) -> Any:
    from diffusers import AutoPipelineForImage2Image

    return AutoPipelineForImage2Image.from_pretrained(tiny_model("sd1"), use_safetensors=True)


def traced(module: Any, name: str) -> Traced:
    generator = torch.Generator().manual_seed(0)
    if name == "unet":
        call = {"sample": torch.randn(2, 4, 9, 11, generator=generator), "timestep": torch.tensor([5.0, 907.0])}
        call["encoder_hidden_states"] = torch.randn(2, 77, module.config.cross_attention_dim, generator=generator)
        part = denoiser_part(name, module, [call, {**call, "sample": call["sample"][:, :, 2:, 2:]}], call)
        example = flatten(call)
    elif name == "vae_encoder":
        part, example = vae_parts(module)[0], {"sample": torch.rand(2, 3, 40, 24, generator=generator) * 2 - 1}
    else:
        part, example = vae_parts(module)[1], {"latent_sample": torch.randn(2, 4, 5, 7, generator=generator)}
    return module, part, example, trace(module, part, example, torch.float16)


def errors(item: Traced, folder: Path) -> tuple[float, float]:
    """The errors of the plain and of the fused fp16 graph against PyTorch in fp32."""
    module, part, example, graph = item
    with torch.no_grad():
        (name, reference), *_ = part.call(module, example).items()
    feed = {key: convert(part, key, value, torch.float16).numpy() for key, value in example.items()}
    graph.write(folder / "plain", Progress(), "plain")
    fuse(graph).write(folder / "fused", Progress(), "fused")
    plain = onnxruntime.InferenceSession(str(folder / "plain" / "model.onnx"), providers=["CPUExecutionProvider"])
    fused = open_expanded(folder / "fused" / "model.onnx")
    first, second = (relative_error(session.run([name], feed)[0], reference) for session in (plain, fused))
    return first, second


def relative_error(value: Any, reference: torch.Tensor) -> float:
    difference = np.asarray(value, dtype=np.float64) - reference.double().numpy()
    return float(np.linalg.norm(difference) / np.linalg.norm(reference.double().numpy()))


def kinds(graph: ExternalWeightsGraph) -> Counter[str]:
    return Counter(node.op_type for node in graph.model.graph.node)


def test_every_fusable_pattern_of_a_unet_is_fused(unet: Traced) -> None:
    plain, fused = kinds(unet[3]), kinds(fuse(unet[3]))

    assert fused["GroupNorm"] + fused["SkipGroupNorm"] == plain["InstanceNormalization"]
    assert fused["MultiHeadAttention"] == plain["Softmax"]
    assert fused["LayerNormalization"] + fused["SkipLayerNormalization"] == plain["LayerNormalization"]
    assert fused["BiasSplitGelu"] == fused["BiasAdd"] == plain["Erf"]
    assert fused["NhwcConv"] == plain["Conv"]
    assert fused["SkipGroupNorm"] > fused["GroupNorm"]
    assert sum(fused.values()) < sum(plain.values()) / 3


def test_shapes_inferred_once_give_the_graph_of_shapes_inferred_by_each_pass(
    unet: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = fuse(unet[3])
    monkeypatch.setattr(_Optimizer, "infer_runtime_shape", UnetOnnxModel.infer_runtime_shape)

    assert fuse(unet[3]).model == once.model


def test_fused_unet_computes_the_same(unet: Traced, tmp_path: Path) -> None:
    plain, fused = errors(unet, tmp_path)
    assert fused < 3 * plain < 1e-2


@pytest.mark.parametrize("name", ["vae_encoder", "vae_decoder"])
def test_fused_vae_computes_the_same(pipe: Any, name: str, tmp_path: Path) -> None:
    item = traced(pipe.vae, name)
    plain, fused = errors(item, tmp_path)
    assert fused < 3 * plain < 1e-2
    assert kinds(fuse(item[3]))["NhwcConv"] == kinds(item[3])["Conv"]


def test_fusion_skips_widths_without_a_kernel(tmp_path: Path) -> None:
    item = traced(build_unet(64), "unet")
    plain, fused = errors(item, tmp_path)
    assert fused < 3 * plain < 1e-2

    found = kinds(fuse(item[3]))
    # Their CUDA kernels are for Stable Diffusion's widths only.
    assert not found["BiasSplitGelu"]
    assert not found["BiasAdd"]
    assert found["MultiHeadAttention"]


def test_fusion_reads_only_small_weights_and_keeps_the_plain_graph(unet: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = unet[3]
    before, names = graph.model.SerializeToString(), set(graph.weights)
    sizes = []
    read = Weight.read

    def counted(self: Weight) -> torch.Tensor:
        sizes.append(self.bytes)
        return read(self)

    monkeypatch.setattr(Weight, "read", counted)
    fused = fuse(graph)

    assert max(sizes) <= 2 * 5120
    assert graph.model.SerializeToString() == before
    assert set(graph.weights) == names
    large = {id(weight.source) for weight in graph.weights.values() if weight.bytes > 2 * 5120}
    assert large == {id(weight.source) for weight in fused.weights.values() if weight.bytes > 2 * 5120}


SHAPE = {"x": (2, 5, 3, 64), "skip": (2, 5, 3, 64), "row": (2, 1, 1, 64), "w": (32, 3, 3, 64), "b": (32,), "c": (64,), "d": (64,)}
VALUES = {
    name: torch.randn(*shape, generator=torch.Generator().manual_seed(index)) for index, (name, shape) in enumerate(SHAPE.items())
}
NORM: dict[str, Any] = {"groups": 8, "epsilon": 1e-5, "activation": 1, "channels_last": 1}


def run(kind: str, names: list[str], values: Tensors, folder: Path, outputs: int = 1, **attributes: Any) -> list[torch.Tensor]:
    """One operator of ONNX Runtime's own, spelled out."""
    node = helper.make_node(kind, names, [f"y{index}" for index in range(outputs)], domain=DOMAIN, **attributes)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, values[name].shape) for name in names]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(helper.make_graph([node], "g", inputs, results), opset_imports=opsets, ir_version=8)
    found = open_beside(expanded(model), folder).run(None, {name: values[name].numpy() for name in names})
    return [torch.from_numpy(value) for value in found]


def normalized(value: torch.Tensor) -> torch.Tensor:
    result = functional.group_norm(value.permute(0, 3, 1, 2), 8, VALUES["c"], VALUES["d"])
    return functional.silu(result).permute(0, 2, 3, 1)


def test_group_norm_expansion_matches_torch(tmp_path: Path) -> None:
    (result,) = run("GroupNorm", ["x", "c", "d"], VALUES, tmp_path, **NORM)
    torch.testing.assert_close(result, normalized(VALUES["x"]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("skip", ["skip", "row"])
def test_skip_group_norm_expansion_matches_torch(skip: str, tmp_path: Path) -> None:
    result, total = run("SkipGroupNorm", ["x", "c", "d", skip], VALUES, tmp_path, 2, **NORM)
    expected = VALUES["x"] + VALUES[skip]
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(result, normalized(expected), atol=1e-5, rtol=1e-5)


def test_nhwc_conv_expansion_matches_torch(tmp_path: Path) -> None:
    (result,) = run("NhwcConv", ["x", "w", "b"], VALUES, tmp_path, strides=[2, 2], pads=[1, 1, 1, 1])
    expected = functional.conv2d(
        VALUES["x"].permute(0, 3, 1, 2), VALUES["w"].permute(0, 3, 1, 2), VALUES["b"], stride=2, padding=1
    )
    torch.testing.assert_close(result, expected.permute(0, 2, 3, 1), atol=1e-4, rtol=1e-4)


def test_bias_split_gelu_and_bias_add_expansions_match_torch(tmp_path: Path) -> None:
    values = {"x": VALUES["x"].flatten(1, 2), "c": VALUES["c"], "skip": VALUES["skip"].flatten(1, 2)}
    (product,) = run("BiasSplitGelu", ["x", "c"], values, tmp_path)
    (total,) = run("BiasAdd", ["x", "c", "skip"], values, tmp_path)

    left, right = (values["x"] + values["c"]).chunk(2, dim=-1)
    torch.testing.assert_close(product, left * functional.gelu(right), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(total, values["x"] + values["c"] + values["skip"])

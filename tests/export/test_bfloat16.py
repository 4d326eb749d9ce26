"""bf16 graphs: valid, of the right types, and, emulated on a CPU, as near to PyTorch in fp32 as PyTorch in bf16 is."""

import copy
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import torch
from covering import nightly_but
from img2img_export.convert import bfloat16, emulation, token_graphs
from img2img_export.convert.external_weights import GRAPH_NAME, ExternalWeightsGraph, Weight
from img2img_export.convert.parts import Part, Tensors, denoiser_part, flatten, text_part, vae_parts
from img2img_export.convert.tracing import trace
from img2img_export.progress import Progress
from img2img_export.verify import control_cases
from onnx import TensorProto, helper

pytestmark = pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based:DeprecationWarning")

Traced = tuple[Any, Part, Tensors, Path]
PARTS = ("unet", "text_encoder", "vae_encoder", "vae_decoder")


@pytest.fixture(scope="module")
def traced(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Traced]:
    """Gives a part of the tiny SD 1 model by its name: module, part, inputs and the folder of its bf16 graph."""
    from diffusers import AutoPipelineForImage2Image

    pipe = AutoPipelineForImage2Image.from_pretrained(tiny_model("sd1"), use_safetensors=True)
    generator = torch.Generator().manual_seed(0)
    root = tmp_path_factory.mktemp("bf16")
    done: dict[str, Traced] = {}

    def make(name: str) -> Traced:
        if name == "unet":
            call: dict[str, torch.Tensor] = {
                "sample": torch.randn(2, 4, 17, 19, generator=generator),
                "timestep": torch.tensor([5.0, 907.0]),
            }
            call["encoder_hidden_states"] = torch.randn(2, 77, pipe.unet.config.cross_attention_dim, generator=generator)
            part = denoiser_part(name, pipe.unet, [flatten(call), {**call, "sample": call["sample"][:, :, 8:, 8:]}], call)
            module, example = pipe.unet, flatten(call)
        elif name == "text_encoder":
            module, part = pipe.text_encoder, text_part(name, pipe.text_encoder, hidden_states=False)
            example = {"input_ids": torch.randint(0, 200, (2, 77), generator=generator)}
        else:
            module, part = pipe.vae, vae_parts(pipe.vae)[PARTS.index(name) - 2]
            example = {"sample": torch.rand(2, 3, 40, 24, generator=generator) * 2 - 1}
            if name == "vae_decoder":
                example = {"latent_sample": torch.randn(2, 4, 5, 7, generator=generator)}
        bfloat16.to_bfloat16(trace(module, part, example, torch.float16)).write(root / name, Progress(), name)
        return module, part, example, root / name / "model.onnx"

    def get(name: str) -> Traced:
        if name not in done:
            done[name] = make(name)
        return done[name]

    return get


def convert(value: torch.Tensor, name: str) -> torch.Tensor:
    return value.bfloat16() if value.is_floating_point() and name != "timestep" else value


def relative_error(value: Any, reference: torch.Tensor) -> float:
    difference = np.asarray(value, dtype=np.float64) - reference.double().numpy()
    return float(np.linalg.norm(difference) / np.linalg.norm(reference.double().numpy()))


@pytest.mark.parametrize("name", PARTS)
def test_emulation_is_about_as_exact_as_torch_in_bf16(traced: Callable[[str], Traced], name: str) -> None:
    module, part, example, path = traced(name)
    narrow = copy.deepcopy(module).bfloat16()
    with torch.no_grad():
        expected = part.call(module, example)
        torch_values = part.call(narrow, {key: convert(value, key) for key, value in example.items()})
    feed = {key: value.numpy() for key, value in example.items()}

    values = emulation.open_emulated(path).run(list(expected), feed)

    for (key, reference), value in zip(expected.items(), values, strict=True):
        assert value.dtype == np.float32
        assert torch.equal(torch.from_numpy(value).bfloat16().float(), torch.from_numpy(value))
        limit = relative_error(torch_values[key].float().numpy(), reference)
        assert limit / 3 < relative_error(value, reference) < 1.5 * limit


@pytest.mark.parametrize("name", PARTS)
def test_graph_is_valid_and_computes_in_bf16(traced: Callable[[str], Traced], name: str) -> None:
    *_, path = traced(name)
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)

    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    assert TensorProto.FLOAT16 not in types.values()
    assert types.get("timestep", TensorProto.FLOAT) == TensorProto.FLOAT
    assert {item.data_type for item in model.graph.initializer} <= {TensorProto.BFLOAT16, TensorProto.INT64}
    # By onnxruntime's docs/OperatorKernels.md its CUDA provider has these in fp32 (or up to opset 21) only.
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    narrow = {item.name for item in inferred if item.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    for node in model.graph.node:
        assert node.op_type != "InstanceNormalization"
        if node.op_type in ("Sin", "Cos", "Resize", "Pad"):
            assert not narrow & {*node.input, *node.output}


def test_weights_stay_bf16_in_their_file(traced: Callable[[str], Traced]) -> None:
    *_, path = traced("unet")
    model = emulation.emulated(onnx.load(str(path), load_external_data=False))

    large = [item for item in model.graph.initializer if item.data_location == TensorProto.EXTERNAL]
    assert large
    assert {item.data_type for item in model.graph.initializer} == {TensorProto.BFLOAT16}
    readers = [node for item in large for node in model.graph.node if item.name in node.input]
    assert {node.op_type for node in readers} == {"Cast"}


def test_values_beyond_the_range_of_fp16_are_kept(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers clips T5's values and computes parts in fp32 in fp16, and not in bf16."""
    from transformers import T5EncoderModel

    module = T5EncoderModel.from_pretrained(tiny_model("flux-dev") / "text_encoder_2").eval()
    ids = torch.randint(0, module.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    part = text_part("text_encoder_2", module, hidden_states=False)
    with torch.no_grad():
        module.shared.weight.mul_(4e5 / module.shared.weight.abs().max())
        expected = part.call(module, {"input_ids": ids})
    bfloat16.to_bfloat16(trace(module, part, {"input_ids": ids}, torch.float16, for_bf16=True)).write(
        tmp_path, Progress(), "text_encoder_2"
    )

    path = tmp_path / "model.onnx"
    assert not {"Clip", "IsInf"} & {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    for found, reference in zip(
        emulation.open_emulated(path).run(list(expected), {"input_ids": ids.numpy()}), expected.values(), strict=True
    ):
        assert relative_error(found, reference) < 0.02


def test_numbers_are_converted_by_value() -> None:
    numbers = np.array([-65504, 0.1, 1e-5, np.inf], dtype=np.float16)
    constant = helper.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(numbers))
    nodes = [constant, helper.make_node("Add", ["x", "w"], ["s"]), helper.make_node("Add", ["s", "c"], ["y"])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [4]) for name in ("x", "y")]
    model = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:]), opset_imports=[helper.make_opsetid("", 18)])
    source = torch.tensor([1.0, 1e-6, 70000.0, 0.3])

    result = bfloat16.to_bfloat16(ExternalWeightsGraph(model, {"w": Weight.of(source, torch.float16)}))

    # From the checkpoint's own numbers, not by way of fp16, in which 70000 is infinite.
    assert torch.equal(result.weights["w"].read(), source.bfloat16())
    found = onnx.numpy_helper.to_array(result.model.graph.node[0].attribute[0].t).astype(np.float32)
    assert np.array_equal(found, torch.from_numpy(numbers).bfloat16().float().numpy())
    assert found[0] == -65536
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16


@pytest.mark.parametrize("name", ["flux-dev", "chroma", "longcat-edit", *nightly_but(["flux"])])
def test_half_precision_does_not_round_timestep_and_guidance(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """diffusers' transformers multiply both by 1000 in the weights' type, which bf16 rounds by up to 16."""
    folder = tiny_model(name)
    kind = getattr(diffusers, json.loads((folder / "transformer" / "config.json").read_text())["_class_name"])
    module = kind.from_pretrained(folder, subfolder="transformer").eval()
    config, generator = module.config, torch.Generator().manual_seed(0)
    taken = inspect.signature(module.forward).parameters

    def call(tokens: int) -> dict[str, torch.Tensor]:
        made = {
            "hidden_states": torch.randn(2, tokens, config.in_channels, generator=generator),
            "encoder_hidden_states": torch.randn(2, 9, config.joint_attention_dim, generator=generator),
            "pooled_projections": torch.randn(2, config.get("pooled_projection_dim", 1), generator=generator),
            "timestep": torch.tensor([0.4337, 0.9871]),
            "txt_ids": torch.zeros(9, 3),
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(tokens / 2)),
        }
        made |= {"guidance": torch.tensor([3.337, 6.771])} if config.get("guidance_embeds") else {}
        return {name: value for name, value in made.items() if name in taken}

    example, other = call(12), call(16)
    if kind.__name__ in token_graphs.KINDS:
        part, graph = token_graphs.token_part("transformer", module)
        example, other = graph.graph.inputs(example), graph.graph.inputs(other)
    else:
        part = denoiser_part("transformer", module, [example, other], example)
    bfloat16.to_bfloat16(trace(module, part, example, torch.float16)).write(tmp_path, Progress(), name)
    found = emulation.open_emulated(tmp_path / GRAPH_NAME).run(None, {key: value.numpy() for key, value in other.items()})[0]
    with torch.no_grad():
        expected = part.call(module, other)["out_hidden_states"].numpy()
    assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


@pytest.mark.parametrize("letter", ["a", *nightly_but(["u", "x"])])
def test_half_precision_rounds_no_timestep_of_a_controlnet_of_flux(
    letter: str, tiny_controlnet: Callable[[str], Path], tmp_path: Path
) -> None:
    module = diffusers.FluxControlNetModel.from_pretrained(tiny_controlnet(f"flux-dev-{letter}")).eval()
    part, example, cases = control_cases.described(module, 3, 5)
    bfloat16.to_bfloat16(trace(module, part, example, torch.float16)).write(tmp_path, Progress(), letter)
    graph = emulation.open_emulated(tmp_path / GRAPH_NAME)
    for case in cases:
        inputs = {name: value.numpy() for name, value in case.inputs.items()}
        for name, found in zip(case.expected, graph.run(list(case.expected), inputs), strict=True):
            expected = case.expected[name]
            assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)

"""ONNX modules in place of torch modules: their interface for diffusers, and how graphs are opened."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from img2img_server.bundle.adapter_files import LoraFiles
from img2img_server.bundle.manifest import Component, Manifest, Precision, read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.errors import BundleError
from img2img_server.runtime import loader
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.lora.adapters import LoraSettings
from img2img_server.runtime.onnx.modules import Graph, OnnxDenoiser, OnnxModule, OnnxTextEncoder, OnnxVae
from img2img_server.runtime.onnx.providers import ProviderChoice
from img2img_server.runtime.onnx.runners import HostRunner
from img2img_server.runtime.onnx.sessions import SessionOptions, open_session
from onnx import TensorProto, helper

Shape = Sequence[int | str]


def save_graph(path: Path, inputs: dict[str, tuple[int, Shape]], kinds: dict[str, int] | None = None) -> Path:
    """A graph that returns each input as `out_NAME`, in the type in `kinds`, otherwise in the input's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {name: (kinds or {}).get(name, kind) for name, (kind, _) in inputs.items()}
    graph = helper.make_graph(
        [helper.make_node("Cast", [name], [f"out_{name}"], to=kinds[name]) for name in inputs],
        "echo",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(f"out_{name}", kinds[name], shape) for name, (_, shape) in inputs.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


def open_graph(path: Path) -> Graph:
    return Graph(HostRunner(open_session(path, SessionOptions())))


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_tensors_are_cast_at_a_graphs_edges_only(tmp_path: Path, kind: int) -> None:
    inputs: dict[str, tuple[int, Shape]] = {
        "sample": (kind, ["b", 2]),
        "timestep": (TensorProto.FLOAT, ["b"]),
        "ids": (TensorProto.INT64, ["b"]),
    }
    graph = open_graph(save_graph(tmp_path / "model.onnx", inputs))
    sample, timestep = torch.tensor([[1.0, 2.5]]), torch.tensor([998.125])
    outputs = graph(sample=sample, timestep=timestep, ids=torch.tensor([7], dtype=torch.int32), unknown=torch.ones(1), left=None)
    assert [value.dtype for value in outputs.values()] == [torch.float32, torch.float32, torch.int64]
    assert torch.equal(outputs["out_sample"], sample)
    assert torch.equal(outputs["out_timestep"], timestep), "a half precision would have rounded it"
    assert torch.equal(outputs["out_ids"], torch.tensor([7]))


def test_graph_input_without_a_torch_dtype_is_refused(tmp_path: Path) -> None:
    path = save_graph(tmp_path / "model.onnx", {"text": (TensorProto.STRING, ["b"])})
    with pytest.raises(BundleError, match=r"'text' is a tensor\(string\)"):
        open_graph(path)


class Recorder:
    """Replaces a graph: records its inputs."""

    def __init__(self, *scalars: str) -> None:
        self.scalars = frozenset(scalars)
        self.row_buckets: tuple[int, ...] = ()
        self.widths: dict[str, int] = {}
        self.input_types: dict[str, torch.dtype] = {}
        self.outputs: Sequence[str] = ("out",)
        self.given: dict[str, torch.Tensor] = {}

    def __call__(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        self.given = tensors
        return {"out": next(iter(tensors.values())) + 1}


def denoiser(folder: Path, model_class: type, recorder: Recorder, **config: Any) -> OnnxDenoiser:
    (folder / "config.json").write_text(json.dumps({"_class_name": model_class.__name__, **config}))
    return OnnxDenoiser(recorder, folder)  # type: ignore[arg-type]


def test_a_unet_is_called_as_diffusers_calls_it(tmp_path: Path) -> None:
    recorder = Recorder()
    unet = denoiser(tmp_path, UNet2DConditionModel, recorder, in_channels=4, projection_class_embeddings_input_dim=80)
    sample, text, ids = torch.zeros(2, 4, 8, 8), torch.ones(2, 7, 3), torch.ones(2, 6)
    (noise,) = unet(
        sample, torch.tensor(981), encoder_hidden_states=text, added_cond_kwargs={"time_ids": ids}, cross_attention_kwargs=None,
        return_dict=False,
    )  # fmt: skip
    assert torch.equal(noise, sample + 1)
    assert set(recorder.given) == {"sample", "timestep", "encoder_hidden_states", "time_ids"}
    assert recorder.given["timestep"].tolist() == [981, 981]
    assert unet(sample, 5, None).sample.shape == unet(sample, 5, None)[0].shape == sample.shape
    unet(sample, torch.tensor([3.0, 4.0]), None)
    assert recorder.given["timestep"].tolist() == [3.0, 4.0]
    assert (unet.dtype, unet.to("cuda"), unet.add_embedding.linear_1.in_features) == (torch.float32, unet, 80)


def test_transformer_takes_its_own_argument_names(tmp_path: Path) -> None:
    recorder = Recorder()
    transformer = denoiser(tmp_path, FluxTransformer2DModel, recorder)
    with transformer.cache_context("cond"):
        transformer(hidden_states=torch.zeros(2, 9, 4), timestep=torch.ones(2), img_ids=torch.zeros(9, 3), guidance=None)
    assert set(recorder.given) == {"hidden_states", "timestep", "img_ids"}
    with pytest.raises(TypeError, match="argument"):
        transformer(sample=torch.zeros(2, 9, 4), timestep=torch.ones(2))


def test_a_graph_with_one_timestep_for_all_gets_a_scalar(tmp_path: Path) -> None:
    recorder = Recorder("timestep")
    unet = denoiser(tmp_path, UNet2DConditionModel, recorder)
    for timestep in (torch.tensor(7.0), torch.tensor([7.0, 7.0])):
        unet(torch.zeros(2, 4, 8, 8), timestep, None)
        assert recorder.given["timestep"].shape == ()


def test_class_unknown_to_diffusers_is_a_bundle_error(tmp_path: Path) -> None:
    class Unheard:
        pass

    with pytest.raises(BundleError, match="'Unheard', which diffusers"):
        denoiser(tmp_path, Unheard, Recorder())


def test_text_encoder_outputs_are_in_transformers_order(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"d_model": 3, "projection_dim": 5}')
    names = ("pooler_output", "last_hidden_state", "hidden_states.0", "hidden_states.1")

    class Encoder(Recorder):
        def __call__(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
            return {name: torch.tensor(float(index)) for index, name in enumerate(names)}

    graph: Any = Encoder()
    graph.outputs = names
    encoder = OnnxTextEncoder(graph, tmp_path)
    outputs = encoder(torch.ones(2, 4, dtype=torch.int64), output_hidden_states=True)
    assert (outputs[0], outputs[1]) == (outputs.last_hidden_state, outputs.pooler_output) == (1.0, 0.0)
    assert outputs.hidden_states == (2.0, 3.0)
    assert (encoder.config.projection_dim, encoder.dtype) == (5, torch.float32)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"num_hidden_layers": 10**12}, "'num_hidden_layers' is 1000000000000, not a whole number from 0 to 10000"),
        ({"text_config": {"num_hidden_layers": "9"}}, "'text_config.num_hidden_layers' is '9'"),
        ({"text_config": 9}, "'text_config' is 9, not an object"),
        ({"num_hidden_layers": 8}, "'num_hidden_layers' is 8, and the graph has 'hidden_states.9'"),
        ({}, "'num_hidden_layers' is missing"),
    ],
)
def test_a_text_encoder_has_at_least_the_layers_of_its_states_and_no_absurd_number(
    tmp_path: Path, config: dict[str, Any], problem: str
) -> None:
    """The tuple of hidden states has an entry for each layer of the configuration."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    graph: Any = Recorder()
    graph.outputs = ["hidden_states.9"]
    with pytest.raises(BundleError, match=problem):
        OnnxTextEncoder(graph, tmp_path)


@pytest.mark.parametrize("make", [OnnxTextEncoder, OnnxDenoiser, OnnxVae])
def test_onnx_modules_implement_the_torch_module_interface(tmp_path: Path, make: Callable[..., OnnxModule]) -> None:
    """diffusers, accelerate and transformers use any of it: diffusers 0.41 began to look for hooks in `modules()`."""
    graph: Any = Recorder()
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    graphs = (graph, graph) if make is OnnxVae else (graph,)
    module = make(*graphs, tmp_path)
    assert (list(module.modules()), dict(module.named_modules()), list(module.children())) == ([module], {"": module}, [])
    assert (list(module.parameters()), list(module.named_parameters()), list(module.buffers())) == ([], [], [])
    assert (dict(module.state_dict()), module.dtype, module.device) == ({}, torch.float32, torch.device("cpu"))
    assert module.eval() is module
    assert module.requires_grad_(False) is module.to("meta", torch.float16) is module.half() is module
    assert not any(hasattr(part, "_hf_hook") for part in module.modules())


def test_hooks_run_around_a_graph(tmp_path: Path) -> None:
    unet = denoiser(tmp_path, UNet2DConditionModel, Recorder())
    seen: list[str] = []
    unet.register_forward_pre_hook(lambda module, arguments: seen.append("before"))
    unet.register_forward_hook(lambda module, arguments, output: seen.append("after"))
    unet(torch.zeros(1, 4, 8, 8), 5, None)
    assert seen == ["before", "after"]


def test_the_fused_graph_is_tried_first_on_cuda(
    bundle: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without CUDA: sessions are opened on the CPU; their own test covers the log."""
    folder = tmp_path / "sd1"
    shutil.copytree(bundle("sd1"), folder)
    shutil.copytree(folder / "unet", folder / "unet_fused")
    shutil.copytree(folder / "vae_decoder", folder / "vae_fused")
    (folder / "vae_fused" / "model.onnx").write_bytes(b"no graph")
    opened: list[str] = []

    def open_on_cpu(path: Path, options: SessionOptions) -> Any:
        opened.append(path.relative_to(folder).as_posix())
        return open_session(path, replace(options, provider="cpu"))

    fused = {"unet": "unet_fused/model.onnx", "vae_decoder": "vae_fused/model.onnx"}
    manifest = with_components(
        read_manifest(folder), *(Component(name, "fp16", fused=path) for name, path in fused.items()), files=fused.values()
    )
    load_pipeline(folder, manifest, Execution("cpu"), open_graph=open_on_cpu)
    assert "unet_fused/model.onnx" not in opened
    opened.clear()
    monkeypatch.setattr(loader, "choose", lambda provider: ProviderChoice("cuda"))
    with caplog.at_level(logging.WARNING):
        load_pipeline(folder, manifest, Execution("cuda"), open_graph=open_on_cpu)
    assert "unet_fused/model.onnx" in opened
    assert "unet/model.onnx" not in opened
    assert opened.index("vae_fused/model.onnx") + 1 == opened.index("vae_decoder/model.onnx")
    assert "the plain graph is used instead" in caplog.text
    stray = with_components(manifest, Component("unet", "fp16", fused="../elsewhere.onnx"))
    with pytest.raises(BundleError, match="not in the bundle"):
        load_pipeline(folder, stray, Execution("cuda"), open_graph=open_on_cpu)


@pytest.mark.parametrize(("precision", "fuses"), [("fp32", True), ("fp16", False)])
def test_the_cpu_provider_runs_fused_attention_in_fp32(
    bundle: Callable[[str], Path], precision: Precision, fuses: bool, tmp_path: Path
) -> None:
    """All graphs of a transformer that have it: rows with and without a LoRA share calls, and their bits are compared."""
    folder, opened = bundle("flux-dev"), list[str]()

    def open_graph(path: Path, options: SessionOptions) -> Any:
        opened.append(path.relative_to(folder).as_posix())
        return open_session(path, options)

    manifest = read_manifest(folder)
    parts = [replace(part, precision=precision) if part.name == "transformer" else part for part in manifest.components]
    loras = LoraSettings(LoraFiles(tmp_path), Cache(0), 8)
    load_pipeline(folder, with_components(manifest, *parts), Execution("cpu"), open_graph=open_graph, loras=loras)
    graphs = {"model_fused_attention.onnx", "lora_fused_attention.onnx"} if fuses else {"model.onnx", "lora.onnx"}
    assert {path for path in opened if path.startswith("transformer/")} == {f"transformer/{name}" for name in graphs}


def with_components(manifest: Manifest, *changed: Component, files: Any = ()) -> Manifest:
    return replace(manifest, components=changed, files={**manifest.files, **dict.fromkeys(files, "")})


def test_bf16_on_a_cpu_error_names_the_requirement(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "sd1"
    shutil.copytree(bundle("sd1"), folder)
    convolution = helper.make_graph(
        [helper.make_node("Conv", ["sample", "weight"], ["out_sample"])],
        "bf16",
        [
            helper.make_tensor_value_info("sample", TensorProto.BFLOAT16, ["b", 1, 4, 4]),
            helper.make_tensor_value_info("weight", TensorProto.BFLOAT16, [1, 1, 3, 3]),
        ],
        [helper.make_tensor_value_info("out_sample", TensorProto.BFLOAT16, ["b", 1, 2, 2])],
    )
    model = helper.make_model(convolution, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    onnx.save(model, str(folder / "unet" / "model.onnx"))
    with pytest.raises(BundleError, match="bf16 graphs need a GPU"):
        load_pipeline(folder, with_components(read_manifest(folder), Component("unet", "bf16")), Execution("cpu"))


def test_classes_outside_known_libraries_are_refused(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "sd1"
    shutil.copytree(bundle("sd1"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    refused = {
        "os": "only classes of",
        "torch": "only classes of",
        "..pipelines": "may name",
        "stable_diffusion.safety_checker": "may name",
    }
    for library, why in refused.items():
        (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": [library, "system"]}))
        with pytest.raises(BundleError, match=why):
            load_pipeline(folder, read_manifest(folder), Execution("cpu"))
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(BundleError, match="'AutoencoderKL', which diffusers"):
        load_pipeline(folder, replace(read_manifest(folder), pipeline_class="AutoencoderKL"), Execution("cpu"))


def test_manifest_can_increase_the_size_multiple(bundle: Callable[[str], Path]) -> None:
    manifest = read_manifest(bundle("sd1"))
    assert load_pipeline(bundle("sd1"), replace(manifest, size_multiple=32), Execution("cpu")).size_multiple == 32
    assert load_pipeline(bundle("sd1"), replace(manifest, size_multiple=None), Execution("cpu")).size_multiple == 8

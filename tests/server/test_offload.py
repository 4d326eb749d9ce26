"""Text encoders whose weights stay in host memory have the same outputs, and take no device memory."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawing import alone, load
from fakes import make_request
from img2img_server.bundle.manifest import read_manifest
from img2img_server.errors import BundleError
from img2img_server.models import memory
from img2img_server.models.memory import Estimates, session_bytes
from img2img_server.runtime.common import layers
from img2img_server.runtime.common.fp32_compute import compute_in_fp32
from img2img_server.runtime.common.offload import offload
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.onnx import components
from img2img_server.runtime.onnx.components import Components, component_class, read_index
from img2img_server.runtime.onnx.runners import HostRunner
from img2img_server.runtime.onnx.sessions import SessionOptions
from img2img_server.runtime.providers import cuda
from PIL import Image

Get = Callable[[str], Path]


def encoder(bundle: Path, dtype: torch.dtype) -> Any:
    kind = component_class(*read_index(bundle)["text_encoder"])
    return kind.from_pretrained(bundle / "text_encoder", torch_dtype=dtype, local_files_only=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("in_fp32", [True, False])
@pytest.mark.parametrize("name", ["klein", "qwenimage"])
def test_states_match_the_same_weights_on_the_device(name: str, dtype: torch.dtype, in_fp32: bool, tiny_model: Get) -> None:
    module = encoder(tiny_model(name), dtype)
    plain = copy.deepcopy(module)
    if in_fp32:
        compute_in_fp32(plain)
    tokens = torch.arange(12)[None] % 50
    offload(module, "cpu", in_fp32)
    weights = [value.data_ptr() for value in module.parameters()]
    with torch.no_grad():
        expected, found = (part(tokens, output_hidden_states=True).hidden_states for part in (plain, module))
    assert all(torch.equal(own, other) for own, other in zip(expected, found, strict=True))
    assert found[-1].dtype == (torch.float32 if in_fp32 else dtype)
    assert (module.dtype, module.device) == (torch.float32 if in_fp32 else dtype, torch.device("cpu"))
    assert module.to("meta") is module
    assert [value.data_ptr() for value in module.parameters()] == weights
    assert {value.dtype for value in module.parameters()} == {dtype}


def test_only_one_layer_is_ready_at_a_time(tiny_model: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack of 28 equal layers, in fp32."""
    module, most = encoder(tiny_model("klein"), torch.float16).model, 0

    def ready() -> int:
        return sum(value.nbytes for value in module.parameters() if isinstance(value, layers.ReadyWeight))

    make_ready = layers._Layer.make_ready

    def made_ready(layer: Any, part: Any, args: Any) -> None:
        nonlocal most
        make_ready(layer, part, args)
        most = max(most, ready())

    monkeypatch.setattr(layers._Layer, "make_ready", made_ready)
    offload(module, "cpu", in_fp32=True)
    with torch.no_grad():
        module(torch.arange(12)[None])
    one = 4 * sum(value.numel() for value in module.layers[0].parameters())
    assert one / 2 < most <= one
    assert ready() == 0


def test_image_is_the_one_without_offload(bundle: Get) -> None:
    """A hybrid in half precision with weights in 4 bits. Its logits, which nothing reads, are not computed."""
    path = bundle("klein:fp16:int4+hybrid")
    pipeline: Any = load(path)
    source = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    request = make_request(image=source, prompt="a lake", num_inference_steps=2)
    expected = alone(pipeline, request)
    (logits,) = [part for part in pipeline._pipe.text_encoder.children() if not list(part.parameters())]
    assert logits(torch.zeros(1, 3, 5)).shape == (1, 3, 0)
    other: Any = load(path)
    kind = component_class(*read_index(path)["text_encoder"])
    other._pipe.text_encoder = components._load(kind, path / "text_encoder", torch.float16, "int4")
    offload(other._pipe.text_encoder, "cpu", in_fp32=True)
    assert np.array_equal(alone(other, request), expected)


def test_graphs_of_text_encoders_run_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In host memory, for every graph of a text encoder, and for no graph of other components."""
    opened: dict[str, SessionOptions] = {}

    class Session:
        def get_inputs(self) -> list[Any]:
            return []

        get_outputs = get_inputs

    def open_graph(graph: Path, options: SessionOptions) -> Any:
        opened[graph.parent.name] = options
        return Session()

    monkeypatch.setattr(cuda, "tensor_device", lambda: "cpu")  # without PyTorch's CUDA
    make = cuda.runners(Execution("cuda", offload="text-encoders"), 1, open_graph)
    for name in ("text_encoder", "text_encoder_2.lora", "transformer"):
        assert isinstance(make(name, tmp_path / name / "model.onnx"), HostRunner)
    assert {name: options.provider for name, options in opened.items()} == {
        "text_encoder": "cpu",
        "text_encoder_2.lora": "cpu",
        "transformer": "cuda",
    }
    assert opened["text_encoder"].lean


def test_bf16_graph_of_a_text_encoder_is_refused(bundle: Get) -> None:
    """The CPU has no kernels for it."""

    def make(name: str, graph: Path) -> Any:
        raise BundleError("no kernel")

    path = bundle("sd3")
    manifest = read_manifest(path)
    manifest = replace(manifest, components=tuple(replace(part, precision="bf16") for part in manifest.components))
    opened = Components(path, manifest, make, "cuda", "cuda", "cuda", offloads=Execution(offload="text-encoders").offloads)
    with pytest.raises(BundleError, match=r"text_encoder_2 is bf16.*--precision fp16"):
        opened._graph("text_encoder_2")
    with pytest.raises(BundleError, match="no kernel"):
        opened._graph("transformer")


@pytest.mark.parametrize("on_gpu", [True, False])
def test_estimated_memory_excludes_weights_that_are_not_on_the_gpu(
    on_gpu: bool, bundle: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "uses_gpu", lambda: on_gpu)
    manifest = read_manifest(bundle("sd3"))
    whole, rest = Estimates(), Estimates(offloads=Execution("cuda", offload="text-encoders").offloads)
    texts = sum(part.bytes for part in manifest.components if part.name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
    assert texts > 0
    saved = texts if on_gpu else 0
    assert whole.weights(manifest) - rest.weights(manifest) == saved
    assert whole.memory(manifest) - rest.memory(manifest) == pytest.approx(session_bytes(saved), abs=1)
    assert rest.measured(manifest, None) == rest.memory(manifest)

"""Offloaded text encoders on fake CUDA libraries: which weights are on the device, and when."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import FakeGpu
from fakes import make_request
from img2img_server.bundle.manifest import Manifest, Source, Verification, read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import Request
from img2img_server.runtime.common.device_copy import enter_stream
from img2img_server.runtime.common.layers import ReadyWeight
from img2img_server.runtime.common.offload import offload
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.torch.load import torch_pipeline
from PIL import Image

Get = Callable[[str], Path]
MB = 2**20
LAYERS, WIDTH = 12, 1024
"""A stack of layers of 4 MB each."""


def load(path: Path, provider: str = "cuda", offload: Any = "text-encoders") -> Any:
    return load_pipeline(path, read_manifest(path), Execution(provider, 1, offload=offload), Cache(0))


def request(prompt: str = "a lake") -> Request:
    return make_request(prompt=prompt, image=Image.new("RGB", (64, 64)), num_inference_steps=2, strength=1.0)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = self.layer(states)
        return states + changed


def stack() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Embedding(8 * WIDTH, WIDTH), *(Block() for _ in range(LAYERS))).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_device_needs_memory_for_one_layer_and_gets_it_back(gpu: FakeGpu, dtype: torch.dtype) -> None:
    """The whole module, 48 MB of layers and a table of 32 MB, would not fit."""
    enter_stream()
    module = stack().to(dtype)
    offload(module, "cuda", in_fp32=True)
    assert not any(weight.is_cuda for weight in module.parameters())
    torch.nn.functional.linear(*torch.zeros(2, 8, 8, device="cuda"))  # takes cuBLAS' own memory, which it keeps
    gc.collect()
    torch.cuda.empty_cache()
    before = gpu.used
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    tokens = torch.zeros(1, 4, dtype=torch.int64, device="cuda")
    with gpu.memory(before + 24 * MB), torch.inference_mode():
        for _ in range(3):
            states = module(tokens)
    layer = 4 * WIDTH * WIDTH
    most = torch.cuda.max_memory_allocated() - start
    assert states.device.type == "cuda"
    assert states.dtype == torch.float32
    assert layer <= most <= 2 * layer, most / MB
    assert gpu.used - before <= 4 * MB, "states and tokens"
    assert not any(isinstance(weight, ReadyWeight) for weight in module.parameters())


def test_hybrids_text_encoder_is_not_on_the_device(bundle: Get, gpu: FakeGpu) -> None:
    path = bundle("klein:fp32:hybrid")
    plain, offloaded = load(path, offload="none")._pipe.text_encoder, load(path)._pipe.text_encoder
    assert {weight.device.type for weight in plain.parameters()} == {"cuda"}
    assert {weight.device.type for weight in offloaded.parameters()} == {"cpu"}
    assert {buffer.device.type for buffer in offloaded.buffers()} == {"cuda"}
    assert offloaded.device.type == "cuda"


def test_pipeline_in_pytorch_keeps_its_text_encoders_on_the_host(tiny_model: Get, gpu: FakeGpu) -> None:
    manifest = Manifest(
        source=Source(repo_id="tiny"), pipeline_class="StableDiffusionXLImg2ImgPipeline", family="whole", backend="torch",
        components=(), files={}, tools={}, verification=Verification(passed=True),
    )  # fmt: skip
    pipe = torch_pipeline(tiny_model("sdxl"), manifest, "cuda", torch.bfloat16, Execution(offload="text-encoders").offloads)
    places = {name: {weight.device.type for weight in part.parameters()} for name, part in pipe.components.items()
              if isinstance(part, torch.nn.Module)}  # fmt: skip
    assert places == {"text_encoder": {"cpu"}, "text_encoder_2": {"cpu"}, "unet": {"cuda"}, "vae": {"cuda"}}
    assert pipe._execution_device.type == "cuda"


def test_graphs_of_text_encoders_compute_on_the_cpu(bundle: Get, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their results, which the fake device could not compute, are those of a server on the CPU; then the device takes over."""
    path = bundle("sd3")
    pipeline, on_cpu = load(path), load(path, "cpu", "none")
    assert pipeline.engine == "onnx:cuda"
    tokens = torch.arange(24).reshape(2, 12)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        expected = on_cpu._pipe.components[name].outputs(tokens)
        found = pipeline._pipe.components[name].outputs(tokens.to("cuda"))
        first = next(iter(expected))
        assert found[first].is_cuda
        assert torch.equal(found[first].cpu(), expected[first])
    monkeypatch.setattr(torch, "isfinite", lambda tensor: torch.ones(tensor.shape, dtype=torch.bool))
    states = pipeline.prepare([request(), request("a tree")])
    while states[0].step < states[0].step_count:
        pipeline.advance(states, pipeline.denoise(states))
    assert len(pipeline.finish(states)) == 2
    for state in states:
        pipeline.release(state)

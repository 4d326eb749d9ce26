"""Models that run in PyTorch on fake CUDA libraries: one stream for all, and the calls of torch.compile, which cannot run."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForImage2Image
from img2img_server.engine.request import Request, run_alone
from img2img_server.runtime.common.device_copy import device_stream
from img2img_server.runtime.opaque.pipeline import OpaquePipeline
from img2img_server.runtime.torch.compile import Compiled
from PIL import Image

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.fixture
def pipe(tiny_model: Callable[[str], Path]) -> Any:
    found = AutoPipelineForImage2Image.from_pretrained(
        tiny_model("sd1"), torch_dtype=torch.float32, local_files_only=True, safety_checker=None
    )
    return found.to("cuda")


def request(**settings: Any) -> Request:
    return Request("", Image.new("RGB", (64, 64), "gray"), "a lake", None, 1.0, 2, 2.0, (0,), **settings)


def test_every_thread_of_a_call_uses_the_shared_stream(pipe: Any) -> None:
    """Memory freed on one stream may still be in use on another, so there is only one."""
    streams: list[tuple[str, bool]] = []

    def note(*_: Any) -> None:
        streams.append((threading.current_thread().name, torch.cuda.current_stream() == device_stream()))

    for name in ("text_encoder", "unet"):
        getattr(pipe, name).register_forward_pre_hook(note)
    pipeline = OpaquePipeline(pipe, "torch:cuda", threads=1)
    for _ in range(2):
        run_alone(pipeline, request())
    assert {name for name, _ in streams} == {"img2img-pipeline"}
    assert all(shared for _, shared in streams)


def test_compiled_modules_are_recorded_with_outputs_outside_graph_memory(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    outputs: set[int] = set()
    steps = 0

    def compile(function: Any, **settings: Any) -> Any:
        asked.append(settings)

        def run(*args: Any, **kwargs: Any) -> torch.Tensor:
            result: torch.Tensor = function(*args, **kwargs)
            outputs.add(result.data_ptr())
            return result

        return run

    def mark() -> None:
        nonlocal steps
        steps += 1

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", mark)
    unet, decoder = Compiled(pipe.unet, "inductor"), Compiled(pipe.vae.decoder, "inductor")
    assert {settings["mode"] for settings in asked} == {"reduce-overhead"}
    blocks = sum(type(part).__name__ == "BasicTransformerBlock" for part in pipe.unet.modules())
    assert len(asked) == blocks + 1
    latents, text = torch.zeros(2, 4, 8, 8, device="cuda"), torch.zeros(2, 77, 32, device="cuda")
    with torch.inference_mode():
        decoded = decoder(latents)
        noise = unet(latents, torch.zeros(2, device="cuda"), encoder_hidden_states=text).sample
    assert steps == 2, "each is a step of its own"
    assert outputs
    assert not {decoded.data_ptr(), noise.data_ptr()} & outputs

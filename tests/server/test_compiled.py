"""torch.compile: the same images, no compilation while a request waits, and a fallback if it fails."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline
from fake_diffusers import FakeDiffusers
from fakes import make_request
from img2img_server.engine.request import Request, run_alone
from img2img_server.runtime.opaque.pipeline import OpaquePipeline
from img2img_server.runtime.torch.compile import compile_modules
from PIL import Image


@pytest.fixture
def pipe(tiny_model: Callable[[str], Path]) -> Any:
    return StableDiffusionImg2ImgPipeline.from_pretrained(
        tiny_model("sd1"), torch_dtype=torch.float32, local_files_only=True, safety_checker=None
    )


def request(width: int, height: int, **settings: Any) -> Request:
    source = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    return make_request(image=source, prompt="a lake", num_inference_steps=3, strength=0.9, **settings)


def difference(some: Sequence[Image.Image], others: Sequence[Image.Image]) -> int:
    pairs = zip(some, others, strict=True)
    return max(int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max()) for one, other in pairs)


def test_compiled_models_give_the_same_images_and_compilation_delays_no_request(pipe: Any) -> None:
    pipeline = OpaquePipeline(pipe, "torch:cpu", threads=1)
    # The native size with guidance and without, another size, more images.
    requests = [request(64, 64), request(64, 64, guidance_scale=1.0), request(72, 64), request(64, 64, seeds=(1, 2))]
    before = [run_alone(pipeline, item) for item in requests]
    compiled = ran = 0

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal compiled
        compiled += 1

        def run(*args: Any) -> Any:
            nonlocal ran
            ran += 1
            return graph(*args)

        return run

    assert compile_modules(pipe, pipeline, backend)
    assert compiled > 0
    ready, used = compiled, []
    for item, images in zip(requests, before, strict=True):
        assert np.asarray(images[0]).std() > 10, "a flat image would prove nothing"
        ran = 0
        assert difference(run_alone(pipeline, item), images) <= 1
        used.append(ran > 0)
    assert used[:3] == [True, True, False], "what was not compiled for runs as it always did"
    assert compiled == ready


class Compiler:
    """Replaces torch.compile: records its arguments, and counts the calls of its results."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.settings: list[dict[str, Any]] = []
        self.calls = 0

    def __call__(self, function: Any, **settings: Any) -> Callable[..., Any]:
        self.compiled.append(type(function.__self__).__name__)
        self.settings.append(settings)

        def run(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return function(*args, **kwargs)

        return run


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("sd1", {"BasicTransformerBlock"}),
        pytest.param("flux", {"FluxTransformerBlock", "FluxSingleTransformerBlock"}, marks=pytest.mark.nightly),
        pytest.param("kandinsky3", {"Kandinsky3UNet"}, marks=pytest.mark.nightly),
    ],
)
def test_repeated_blocks_of_a_denoiser_are_compiled(
    name: str, blocks: set[str], tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code is used for the compiled shapes only; the third class repeats no layers, and is compiled as one."""
    pipe = AutoPipelineForImage2Image.from_pretrained(tiny_model(name), torch_dtype=torch.float32, local_files_only=True)
    pipeline, compiler = OpaquePipeline(pipe, "torch:cpu", threads=1), Compiler()
    monkeypatch.setattr(torch, "compile", compiler)
    native = [request(*pipeline.native_size, guidance_scale=scale) for scale in (7.5, 1.0)]
    before = [run_alone(pipeline, item) for item in native]
    assert compile_modules(pipe, pipeline)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    there = [type(part).__name__ for part in denoiser.modules() if type(part).__name__ in blocks]
    *compiled, decoder = compiler.compiled
    assert sorted(compiled) == sorted(there)
    assert set(compiled) == blocks
    assert decoder not in blocks, "the VAE's decoder is compiled whole"
    assert all(given["dynamic"] is False and "mode" not in given for given in compiler.settings), "nothing is recorded on a CPU"
    for item, images in zip(native, before, strict=True):
        calls = compiler.calls
        assert difference(run_alone(pipeline, item), images) == 0
        assert compiler.calls > calls
    calls, width = compiler.calls, pipeline.native_size[0]
    run_alone(pipeline, request(width, width + pipeline.size_multiple * 2))
    assert compiler.calls == calls
    assert not any(part._compiled_call_impl for part in denoiser.modules())


def test_failed_compilation_leaves_the_model_unchanged(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        raise RuntimeError("there is no C++ compiler\nand more")

    pipeline = OpaquePipeline(pipe, "torch:cpu", threads=1)
    (before,) = run_alone(pipeline, request(64, 64))
    assert not compile_modules(pipe, pipeline, backend)
    assert "torch.compile failed; the model runs without it" in caplog.text
    assert "there is no C++ compiler" in caplog.text
    assert difference(run_alone(pipeline, request(64, 64)), [before]) == 0


def test_bundles_without_torch_modules_compile_nothing() -> None:
    pipe = FakeDiffusers()
    assert not compile_modules(pipe, OpaquePipeline(pipe, "fake:cpu", threads=1))
    assert pipe.steps == 0

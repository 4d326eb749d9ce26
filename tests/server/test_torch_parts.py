"""PyTorch modules: the dtype chosen for the device, and the memory format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import make_request
from img2img_server.bundle.manifest import Manifest, Source, Verification
from img2img_server.engine.request import run_alone
from img2img_server.errors import BundleError
from img2img_server.runtime.common import cpu
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.opaque.pipeline import OpaquePipeline
from img2img_server.runtime.torch.load import choose_dtype, torch_device, torch_pipeline
from PIL import Image


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_gpu_uses_bfloat16_if_supported(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype("cuda", Execution()) == dtype
    assert choose_dtype("cuda", Execution(arithmetic="fp32")) == torch.float32


@pytest.mark.parametrize(
    ("flags", "limit", "dtype"),
    [
        ("fpu avx512f amx_bf16", "", torch.bfloat16),
        ("fpu avx512_bf16", "", torch.bfloat16),
        ("fpu avx512_bf16", "ALL", torch.bfloat16),
        ("fpu avx512_bf16", "avx512_core", torch.float32),
        ("fpu avx512_fp16 avx512_vnni", "", torch.float32),
        ("fpu avx2", "", torch.float32),
    ],
)
def test_cpu_uses_bfloat16_only_with_native_instructions(
    monkeypatch: pytest.MonkeyPatch, flags: str, limit: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(cpu, "flags", lambda information: frozenset(flags.split()))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert choose_dtype("cpu", Execution()) == dtype
    assert choose_dtype("cpu", Execution(arithmetic="fp32")) == torch.float32


def test_dtype_on_cpu_follows_the_flags_in_proc_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    assert (choose_dtype("cpu", Execution()) == torch.bfloat16) == (not {"amx_bf16", "avx512_bf16"}.isdisjoint(flags))


def test_missing_device_is_an_error() -> None:
    with pytest.raises(BundleError, match="PyTorch has no provider 'openvino'"):
        torch_device("openvino")
    assert torch_device("cpu") == "cpu"


def manifest(pipeline_class: str) -> Manifest:
    return Manifest(
        source=Source(repo_id="tiny"), pipeline_class=pipeline_class, family="whole", backend="torch", components=(), files={},
        tools={}, verification=Verification(passed=True),
    )  # fmt: skip


def draw(pipe: Any) -> Any:
    source = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    request = make_request(image=source, prompt="a lake", num_inference_steps=3, guidance_scale=3.0)
    return np.asarray(run_alone(OpaquePipeline(pipe, "torch:cpu", threads=1), request)[0], float)


@pytest.mark.filterwarnings("ignore:The following named arguments are not valid")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vae_that_overflows_in_half_precision_stays_in_float32(tiny_model: Callable[[str], Path], dtype: torch.dtype) -> None:
    bundle, named = tiny_model("sdxl-overflow"), manifest("StableDiffusionXLImg2ImgPipeline")
    half, single = (torch_pipeline(bundle, named, "cpu", kind) for kind in (dtype, torch.float32))
    assert (half.unet.dtype, half.text_encoder.dtype, single.unet.dtype) == (dtype, dtype, torch.float32)
    error = np.abs(draw(half) - draw(single)).mean()
    assert 0 < error < (1 if dtype == torch.float16 else 6)


def test_convolution_weights_are_channels_last(tiny_model: Callable[[str], Path]) -> None:
    pipe = torch_pipeline(tiny_model("sd1"), manifest("StableDiffusionImg2ImgPipeline"), "cpu")
    for module in (pipe.unet, pipe.vae):
        weights = [part.weight for part in module.modules() if isinstance(part, torch.nn.Conv2d)]
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)

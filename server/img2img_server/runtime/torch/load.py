"""Models that run in PyTorch: on which device, of which type, in which memory format. CUDA is not yet run on a GPU."""

from pathlib import Path
from typing import Any

import torch

from img2img_server.bundle.manifest import Manifest
from img2img_server.errors import BundleError
from img2img_server.runtime.common.weight_budget import within
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.onnx.components import LOAD_ERRORS, pipeline_class, read_index

_BFLOAT16_SINCE = (8, 0)
"""The first compute capability of NVIDIA's GPUs that multiplies bfloat16: Ampere."""


def torch_pipeline(bundle: Path, manifest: Manifest, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """The img2img class that the manifest names, all of it in torch, on `device` and of `dtype`. Raises BundleError.

    A VAE whose configuration says force_upcast is computed in float32 by the classes that look at that; in a smaller type the
    images are to be judged before they are served, whatever the class.
    """
    kind = pipeline_class(manifest)
    # Without these diffusers asks for parts that the model was saved without, such as SD 3's T5.
    left_out = [name for name, entry in read_index(bundle).items() if entry == [None, None]]
    try:
        with within(bundle.rglob("*.safetensors")):
            pipe = kind.from_pretrained(
                str(bundle), use_safetensors=True, local_files_only=True, torch_dtype=dtype, **dict.fromkeys(left_out)
            )
        pipe.to(device)
    except LOAD_ERRORS as error:
        raise BundleError(f"{bundle} does not load: {error}") from error
    lay_out(pipe)
    return pipe


def lay_out(pipe: Any) -> None:
    """Puts the channels of convolutions last in memory, where matrix products find them.

    On a CPU with AVX2, in float32, that is as fast (UNet 1.00, VAE decoder 0.99, encoder 0.96 of the time); in half precision
    and on GPUs it is what their convolutions want. Sums are rounded otherwise.
    """
    for module in pipe.components.values():
        for part in module.modules() if isinstance(module, torch.nn.Module) else ():
            # One by one: beside them there may be convolutions of videos, which have no such layout.
            if isinstance(part, torch.nn.Conv2d):
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stubs lack it


def torch_device(provider: str) -> str:
    """Where torch modules go, "cuda" or "cpu". Raises BundleError for what is not there, or is none of PyTorch's devices."""
    if provider not in ("auto", "cuda", "cpu"):
        raise BundleError(f"PyTorch has no provider '{provider}'")
    there = torch.cuda.is_available()
    if provider == "cuda" and not there:
        raise BundleError("provider 'cuda' was asked for, and PyTorch finds no CUDA device")
    return "cuda" if there and provider != "cpu" else "cpu"


def choose_dtype(device: str, execution: Execution) -> torch.dtype:
    """The type in which torch modules are quickest on `device`, "cuda" or "cpu"; float32 where nothing less is allowed.

    A CPU without AMX gains little by bfloat16, or loses: with AVX2 alone a matrix product takes 120 times as long. float16 has
    too small a range for some models, so it is only for GPUs without bfloat16.
    """
    if execution.arithmetic == "fp32":
        return torch.float32
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= _BFLOAT16_SINCE else torch.float16
    return torch.bfloat16 if torch.cpu.get_capabilities().get("amx_bf16") else torch.float32

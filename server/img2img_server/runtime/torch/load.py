"""Loads models in PyTorch: device, dtype and memory format. CUDA is not yet run on a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from img2img_server.bundle.manifest import Manifest
from img2img_server.errors import BundleError
from img2img_server.runtime.common import cpu
from img2img_server.runtime.common.offload import offload
from img2img_server.runtime.common.pipe import parts as parts_of
from img2img_server.runtime.common.processors import processors
from img2img_server.runtime.common.weight_budget import within
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.onnx.components import LOAD_ERRORS, component_class, pipeline_class, read_index

_BFLOAT16_SINCE = (8, 0)
"""The first compute capability of NVIDIA GPUs with bfloat16: Ampere."""


def torch_pipeline(
    bundle: Path,
    manifest: Manifest,
    device: str,
    dtype: torch.dtype = torch.float32,
    offloads: Callable[[str], bool] = lambda name: False,
) -> Any:
    """The manifest's img2img class with all parts in torch, on `device` and in `dtype`. On a GPU the weights of components of
    which `offloads` is true stay in host memory. Raises BundleError.

    A VAE with force_upcast in its configuration is computed in float32 only by classes that check it, so in a smaller dtype the
    caller must run the accuracy check.
    """
    kind = pipeline_class(manifest)
    # Otherwise diffusers requires parts that the model was saved without, such as SD 3's T5.
    index = read_index(bundle)
    left_out = [name for name, entry in index.items() if entry == [None, None]]
    kinds = {name: component_class(*entry) for name, entry in index.items() if _is_component(entry)}
    try:
        with within(bundle.rglob("*.safetensors")):
            parts = dict.fromkeys(left_out) | processors(bundle, kinds)
            pipe = kind.from_pretrained(str(bundle), use_safetensors=True, local_files_only=True, torch_dtype=dtype, **parts)
        if device == "cuda":
            _offload(pipe, device, offloads)
        pipe.to(device)
    except LOAD_ERRORS as error:
        raise BundleError(f"{bundle} does not load: {error}") from error
    lay_out(pipe)
    return pipe


def _offload(pipe: Any, device: str, offloads: Callable[[str], bool]) -> None:
    for inner in parts_of(pipe):
        for name, module in getattr(inner, "components", {}).items():
            if isinstance(module, torch.nn.Module) and offloads(name):
                offload(module, device)


def _is_component(entry: Any) -> bool:
    """Whether an entry of model_index.json is a component: its library and its class."""
    return isinstance(entry, list) and len(entry) == 2 and None not in entry


def lay_out(pipe: Any) -> None:
    """Converts the weights of 2D convolutions to the channels_last memory format.

    In half precision and on GPUs convolutions are faster in it. On a CPU with AVX2 in float32 it makes no difference (0.96 to
    1.00 of the time). Results differ in rounding.
    """
    for module in pipe.components.values():
        for part in module.modules() if isinstance(module, torch.nn.Module) else ():
            # Only Conv2d: convolutions of videos do not support this format.
            if isinstance(part, torch.nn.Conv2d):
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stubs lack it


def torch_device(provider: str) -> str:
    """The device of torch modules, "cuda" or "cpu". Raises BundleError if it is not available, or not one of PyTorch's."""
    if provider not in ("auto", "cuda", "cpu"):
        raise BundleError(f"PyTorch has no provider '{provider}': use auto, cuda or cpu")
    there = torch.cuda.is_available()
    if provider == "cuda" and not there:
        raise BundleError("provider 'cuda' cannot be used: PyTorch finds no CUDA device")
    return "cuda" if there and provider != "cpu" else "cpu"


def choose_dtype(device: str, execution: Execution) -> torch.dtype:
    """The fastest dtype of torch modules on `device`, "cuda" or "cpu"; float32 if `execution` requires it.

    A CPU without instructions for bfloat16 is slower in it: with AVX2 only, a matrix product takes 120 times as long. The range
    of float16 is too small for some models, so it is used only on GPUs without bfloat16.
    """
    if execution.arithmetic == "fp32":
        return torch.float32
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= _BFLOAT16_SINCE else torch.float16
    return torch.bfloat16 if cpu.multiplies_bfloat16() else torch.float32

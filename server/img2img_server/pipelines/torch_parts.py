"""Models that run in PyTorch: on which device, of which type, in which memory format."""

from pathlib import Path
from typing import Any

import torch

from img2img_server.bundle import Manifest
from img2img_server.errors import BundleError
from img2img_server.pipelines.components import LOAD_ERRORS, pipeline_class, read_index


def torch_pipeline(bundle: Path, manifest: Manifest, device: str) -> Any:
    """The img2img class that the manifest names, all of it in torch, in float32. Raises BundleError."""
    kind = pipeline_class(manifest)
    # Without these diffusers asks for parts that the model was saved without, such as SD 3's T5.
    left_out = [name for name, entry in read_index(bundle).items() if entry == [None, None]]
    try:
        return kind.from_pretrained(
            str(bundle), use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, **dict.fromkeys(left_out)
        ).to(device)
    except LOAD_ERRORS as error:
        raise BundleError(f"{bundle} does not load: {error}") from error


def torch_device(provider: str) -> str:
    """Where torch modules go, "cuda" or "cpu". Raises BundleError for what is not there, or is none of PyTorch's devices."""
    if provider not in ("auto", "cuda", "cpu"):
        raise BundleError(f"PyTorch has no provider '{provider}'")
    there = torch.cuda.is_available()
    if provider == "cuda" and not there:
        raise BundleError("provider 'cuda' was asked for, and PyTorch finds no CUDA device")
    return "cuda" if there and provider != "cpu" else "cpu"

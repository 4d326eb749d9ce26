"""The bundle of a model that has no graphs: diffusers' own layout with safetensors, which AutoPipeline loads back."""

import shutil
from pathlib import Path
from typing import Any

import torch
from img2img_server.bundle import Component

from img2img_export.graphs import quiet
from img2img_export.models import modules

_PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def save(pipeline: Any, bundle: Path) -> tuple[Component, ...]:
    """Saves the pipeline into the directory `bundle`, and names its components."""
    with quiet():
        pipeline.save_pretrained(bundle, safe_serialization=True)
    return tuple(Component(name, _precision(module)) for name, module in modules(pipeline).items())


def clear(bundle: Path) -> None:
    """Empties the directory of what a failed export of graphs left."""
    shutil.rmtree(bundle)
    bundle.mkdir()


def _precision(module: torch.nn.Module) -> str:
    kinds = [_PRECISIONS[part.dtype] for part in module.parameters() if part.dtype in _PRECISIONS]
    return max(sorted(set(kinds)), key=kinds.count, default="fp32")

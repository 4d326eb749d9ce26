"""Loading a checkpoint with diffusers, and deciding what becomes of it: graphs, or PyTorch with the reason."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoPipelineForImage2Image

from img2img_export.checkpoint import Layout
from img2img_export.errors import ExportError, first_line
from img2img_export.graphs import quiet
from img2img_export.options import Backend

FAMILIES = {
    "StableDiffusionImg2ImgPipeline": "stable-diffusion",
    "StableDiffusionXLImg2ImgPipeline": "stable-diffusion-xl",
}
"""The image-to-image classes that graphs are made of, and the family by which the server knows how to split them."""

WHOLE = "whole"
"""The family of every other class: the server runs its pipeline from start to end."""

_PRIOR_HINT = "it lacks its prior, so load the combined pipeline, save_pretrained it and export that directory: "
_LOAD_FAILURES = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to make of a pipeline. `reason` says why it is torch, where it is."""

    pipeline_class: str
    family: str
    backend: Literal["onnx", "torch"]
    reason: str | None = None


def load(directory: Path, layout: Layout | None = None, variant: str | None = None) -> Any:
    """The image-to-image pipeline of the checkpoint or torch bundle in `directory`, on the CPU in fp32.

    Weights stored in another precision are converted. Only safetensors are read, and nothing but local files. Raises
    ExportError where diffusers does not take it.
    """
    parts: dict[str, Any] = dict.fromkeys(layout.left_out) if layout else {}
    if "safety_checker" in parts:
        parts["requires_safety_checker"] = False
    try:
        with quiet():
            pipeline = AutoPipelineForImage2Image.from_pretrained(
                str(directory),
                use_safetensors=True,
                local_files_only=True,
                torch_dtype=torch.float32,
                variant=variant,
                **parts,
            )
    except _LOAD_FAILURES as error:
        hint = _PRIOR_HINT if "'prior_prior'" in str(error) else ""
        raise ExportError(f"diffusers cannot load it: {hint}{type(error).__name__}: {first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plan(pipeline: Any, backend: Backend) -> Plan:
    """Decides by the pipeline's class. Raises ExportError where graphs were asked for and there can be none."""
    name = type(pipeline).__name__
    family = FAMILIES.get(name, WHOLE)
    if backend == "torch":
        return Plan(name, family, "torch", "asked for with --backend torch")
    if family is not WHOLE:
        return Plan(name, family, "onnx")
    reason = f"img2img makes no graphs of {name}, only of {' and '.join(FAMILIES)}"
    if backend == "onnx":
        raise ExportError(reason)
    return Plan(name, family, "torch", reason)


def modules(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The components of a pipeline that have weights, by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}

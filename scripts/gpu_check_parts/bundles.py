"""A bundle in a minute or two: our exporter's graphs of a pipeline in memory, compared with nothing.

`img2img export` reads a checkpoint and draws reference pictures, which on a CPU takes longer than a GPU machine is lent for.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image
from img2img_export import torch_bundle
from img2img_export.captures import VAE, Recorder
from img2img_export.conversion import FUSED, part_of
from img2img_export.errors import FAILURES
from img2img_export.fusion import fuse
from img2img_export.graphs import describe_graph, quiet
from img2img_export.models import GRAPHS
from img2img_export.parts import Tensors
from img2img_export.progress import Progress
from img2img_export.skeleton import GRAPH_NAME
from img2img_export.tracing import trace
from img2img_server.bundle import Component, Manifest, Source, Verification, list_files, write_manifest
from PIL import Image

_FUSABLE = ("unet", "vae_encoder", "vae_decoder")
_ODD = {"unet": ("sample", (9, 11)), "vae_encoder": ("sample", (72, 88)), "vae_decoder": ("latent_sample", (9, 11))}
"""Inputs to trace with of a size that keeps every size open."""
_SIDE = 64
"""Pixels of the picture that shows what the parts are called with."""


def make_bundle(pipeline: Any, folder: Path, precision: str) -> list[str]:
    """Writes the graphs of a diffusers pipeline in `precision` (fp32 or fp16) into `folder`, and the rest of a bundle.

    The pipeline is on the CPU afterwards. Returns in a line each what fused graphs could not be made. The manifest says that
    nothing was verified, and has no checksums: a server would refuse it.
    """
    image_pipeline = AutoPipelineForImage2Image.from_pipe(pipeline)
    kind = type(image_pipeline).__name__
    family, graphs = GRAPHS[kind]
    with quiet(), Recorder(image_pipeline, graphs) as recorder:
        image_pipeline.set_progress_bar_config(disable=True)
        image_pipeline(prompt="a lake", image=Image.new("RGB", (_SIDE, _SIDE)), num_inference_steps=2, strength=0.5)
    image_pipeline.to("cpu")
    problems: list[str] = []
    components: list[Component] = []
    for component in graphs:
        module = image_pipeline.components[component]
        for name in ("vae_encoder", "vae_decoder") if component == VAE else (component,):
            problems += _write(name, module, recorder.calls[name], folder, precision)
            components.append(_described(folder, name))
    torch_bundle.save(image_pipeline, graphs, precision, folder)
    manifest = Manifest(
        source=Source(path="random weights"),
        pipeline_class=kind,
        family=family,
        backend="onnx",
        components=tuple(components),
        files=dict.fromkeys(list_files(folder), ""),
        tools={},
        verification=Verification(False, problems=("made by scripts/gpu_check: compared with nothing",)),
        precision=precision,
    )
    write_manifest(folder, manifest)
    return problems


def _write(name: str, module: Any, calls: Any, folder: Path, precision: str) -> list[str]:
    with quiet(), torch.no_grad():
        part = part_of(name, module, calls)
        example = _example(name, {key: value.cpu() for key, value in calls.all()[0].items()})
        skeleton = trace(module, part, example, torch.float16 if precision == "fp16" else torch.float32)
        if hasattr(module, "save_config"):
            module.save_config(folder / name)
        else:
            module.config.save_pretrained(folder / name)
    skeleton.write(folder / name, Progress(), name)
    if precision != "fp16" or name not in _FUSABLE:
        return []
    try:
        fuse(skeleton).write(folder / name / FUSED, Progress(), name)
    except FAILURES as error:
        return [f"{name} has no fused graph: {type(error).__name__}: {error}"]
    return []


def _example(name: str, call: Tensors) -> Tensors:
    """Two rows of a call, of an odd size."""
    rows = len(next(iter(call.values())))
    example = {key: torch.cat([value, value])[:2] if value.ndim and len(value) == rows else value for key, value in call.items()}
    if name in _ODD:
        tensor, size = _ODD[name]
        example[tensor] = torch.randn(*example[tensor].shape[:2], *size).to(example[tensor].dtype)
    return example


def _described(folder: Path, name: str) -> Component:
    component = describe_graph(folder, name)
    fused = f"{name}/{FUSED}/{GRAPH_NAME}"
    if not (folder / fused).is_file():
        return component
    return Component(
        name, component.precision, component.opset, component.inputs, component.outputs, fused=fused, bytes=component.bytes
    )

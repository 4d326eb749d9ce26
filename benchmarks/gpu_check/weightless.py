"""Graphs without weights: made on a machine with the exporter, and filled with random weights on the machine that runs them.

They are the exporter's graphs, plain and fused, of modules on the meta device. `make` writes a folder of a few megabytes for each
model; `fill` turns it into a folder that the server loads.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from img2img_export.convert.external_weights import GRAPH_NAME, ExternalWeightsGraph
from img2img_export.progress import Progress
from img2img_server.bundle.manifest import Manifest, Source, Verification, list_files, write_manifest

from gpu_check.random_weights import RandomWeight
from gpu_check.settings import READY_NAME

WEIGHTS_NAME = "weights.json"
"""The file next to a graph without weights that describes each weight."""
_FUSED = "cuda"


def make(name: str, folder: Path, precision: str) -> None:
    """Writes the model's graphs (models.NAMES) without weights into `folder`, in fp32 or fp16; in fp16 also the fused ones.

    Needs the extra `export`. Raises ExportError if a graph cannot be made.
    """
    from img2img_export.convert import torch_bundle

    from gpu_check import models

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if name in models.WHOLE:
        pipeline = models.pipeline(name)
        torch_bundle.save(pipeline, ("text_encoder", "unet", "vae"), precision, folder)
        for part, component in (("text_encoder", "text_encoder"), ("vae_encoder", "vae"), ("vae_decoder", "vae")):
            _make(part, pipeline.components[component], folder / part, precision)
        unet = pipeline.unet
    else:
        unet = models.unet(name)
    _make("unet", unet, folder / "unet", precision)
    (folder / READY_NAME).write_text(precision)


def fill(graphs: Path, folder: Path, wanted: Callable[[str], bool] = lambda graph: True) -> None:
    """Writes a folder with random weights from the folder `graphs` of `make`.

    `wanted` chooses graphs by their folders, such as "unet" or "unet/cuda". A model with all parts becomes a bundle; its manifest
    says that nothing was verified, and has no checksums.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for path in sorted(graphs.rglob("*")):
        target = folder / path.relative_to(graphs)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif path.name not in (GRAPH_NAME, WEIGHTS_NAME, READY_NAME):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    for path in sorted(graphs.rglob(WEIGHTS_NAME)):
        graph = path.parent.relative_to(graphs)
        if wanted(graph.as_posix()):
            _read(path.parent).write(folder / graph, Progress(), str(graph))
    if (folder / "model_index.json").is_file():
        _write_manifest(folder, (graphs / READY_NAME).read_text())
    shutil.copyfile(graphs / READY_NAME, folder / READY_NAME)


def _make(part: str, module: Any, folder: Path, precision: str) -> None:
    from img2img_export.component import part_of
    from img2img_export.convert.fusion import fuse
    from img2img_export.convert.graphs import quiet
    from img2img_export.convert.parts import flatten
    from img2img_export.convert.tracing import trace
    from img2img_export.verify.recorded_inputs import Calls

    call = _call(part, module.config)
    calls = Calls(call)
    calls.add(flatten(call))
    with quiet(), torch.no_grad():
        described = part_of(part, module, calls)
        graph = trace(module, described, flatten(call), torch.float16 if precision == "fp16" else torch.float32)
        if hasattr(module, "save_config"):
            module.save_config(folder)
        else:
            module.config.save_pretrained(folder)
    _name_weights(graph, module)
    _write(graph, folder)
    if precision == "fp16" and part != "text_encoder":
        _write(fuse(graph), folder / _FUSED)


def _call(part: str, config: Any) -> dict[str, Any]:
    """A pipeline's call of the part: two rows of an odd size, so that all sizes stay dynamic."""
    from gpu_check.models import unet_feed

    if part == "text_encoder":
        return {"input_ids": torch.arange(2 * 77).reshape(2, 77)}
    if part == "vae_encoder":
        return {"sample": torch.randn(2, 3, 72, 88)}
    if part == "vae_decoder":
        return {"latent_sample": torch.randn(2, 4, 9, 11)}
    feed = unet_feed(config, 2, 64)
    feed["sample"] = torch.randn(2, config["in_channels"], 9, 11)
    added = {name: feed.pop(name) for name in ("text_embeds", "time_ids") if name in feed}
    return {**feed, "added_cond_kwargs": added}


def _name_weights(graph: ExternalWeightsGraph, module: Any) -> None:
    """Replaces each parameter by a description of its values. Other weights (position ids) go into the graph."""
    names = {id(value): name for name, value in module.named_parameters()}
    for key, weight in list(graph.weights.items()):
        name = names.get(id(weight.source))
        if name is None:
            graph.model.graph.initializer.append(onnx.numpy_helper.from_array(weight.array(), key))
            del graph.weights[key]
        else:
            graph.weights[key] = RandomWeight(weight.source, weight.dtype, weight.shape, weight.permutation, name)


def _write(graph: ExternalWeightsGraph, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(graph.model, str(folder / GRAPH_NAME))
    weights = {
        key: {
            "name": weight.name,
            "source": list(weight.source.shape),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "shape": weight.shape,
            "permutation": weight.permutation,
        }
        for key, weight in graph.weights.items()
        if isinstance(weight, RandomWeight)
    }
    assert len(weights) == len(graph.weights), "a weight has no name"
    (folder / WEIGHTS_NAME).write_text(json.dumps(weights))


def _read(folder: Path) -> ExternalWeightsGraph:
    described = json.loads((folder / WEIGHTS_NAME).read_text())
    weights = {
        key: RandomWeight(
            torch.empty(item["source"], device="meta"),
            getattr(torch, item["dtype"]),
            tuple(item["shape"]),
            None if item["permutation"] is None else tuple(item["permutation"]),
            item["name"],
        )
        for key, item in described.items()
    }
    return ExternalWeightsGraph(onnx.load(str(folder / GRAPH_NAME)), dict(weights))


def _write_manifest(folder: Path, precision: str) -> None:
    from img2img_export.convert.graphs import describe_graph

    components = []
    for path in sorted(folder.glob(f"*/{GRAPH_NAME}")):
        found = describe_graph(folder, path.parent.name)
        fused = f"{path.parent.name}/{_FUSED}/{GRAPH_NAME}"
        components.append(dataclasses.replace(found, fused=fused if (folder / fused).is_file() else ""))
    manifest = Manifest(
        source=Source(path="random weights"),
        pipeline_class="StableDiffusionImg2ImgPipeline",
        family="stable-diffusion",
        backend="onnx",
        components=tuple(components),
        files=dict.fromkeys(list_files(folder), ""),
        tools={},
        verification=Verification(False, problems=("made by scripts/gpu_check: not verified",)),
        precision=precision,
    )
    write_manifest(folder, manifest)

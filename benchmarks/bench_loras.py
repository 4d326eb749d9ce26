"""LoRAs of requests: one call of the denoiser with 1, 4 and 8 of them in its rows, against none, against calls divided by LoRA,
and against loading fused weights.

The rows have one image each, without guidance. All variants are measured in turns in this process. LoRAs have random matrices of
rank 16 in every layer that requests can adapt, without or with the 3 x 3 convolutions; without, the products of these have rank
1. In calls of the control graph without LoRAs all products have rank 1: one variant measures these alone.
"""

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_steps

_RANK = 16
_KERNELS = "convolved-"
"""The beginning of the names of LoRAs that adapt 3 x 3 convolutions, too."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    bench_steps.configure(parser, "a bundle with LoRA graphs")


def run(arguments: argparse.Namespace) -> int:
    """Measures the variants and prints a table: medians and minima of a step for all rows, in milliseconds."""
    from img2img_server.bundle.manifest import read_manifest
    from img2img_server.runtime.execution import Execution
    from img2img_server.runtime.onnx.sessions import SessionOptions, open_session

    manifest = read_manifest(arguments.bundle)
    graph = arguments.bundle / "unet" / "model.onnx"
    threads = Execution().threads or 1
    with tempfile.TemporaryDirectory(prefix="img2img-loras-") as folder:
        pipeline = _load(arguments.bundle, manifest, Path(folder), arguments.rows)
        batches = {count: _states(pipeline, Path(folder), arguments.rows, count) for count in (0, 1, 4, arguments.rows)}
        convolved = {count: _states(pipeline, Path(folder), arguments.rows, count, _KERNELS) for count in (1, arguments.rows)}
        one_by_one = batches[arguments.rows]
        plain = batches[0]
        least = _least_graph(pipeline)
        variants: dict[str, Callable[[], Any]] = {
            "none: the plain graph": lambda: pipeline.denoise(plain),
            "none: the LoRA graph, all products of rank 1": lambda: _denoise_with(pipeline, least, plain),
            "1 LoRA": lambda: pipeline.denoise(batches[1]),
            "4 LoRAs": lambda: pipeline.denoise(batches[4]),
            f"{arguments.rows} LoRAs": lambda: pipeline.denoise(batches[arguments.rows]),
            "1 LoRA with 3 x 3 convolutions": lambda: pipeline.denoise(convolved[1]),
            f"{arguments.rows} LoRAs with 3 x 3 convolutions": lambda: pipeline.denoise(convolved[arguments.rows]),
            f"{arguments.rows} LoRAs, a call each": lambda: [pipeline.denoise([state]) for state in one_by_one],
            f"{arguments.rows} fused models, a call each": lambda: [pipeline.denoise([state]) for state in plain],
            "to open one session with fused weights": lambda: open_session(graph, SessionOptions("cpu", threads)),
        }
        bench_steps.measure(variants, arguments)
    return 0


def _load(bundle: Path, manifest: Any, folder: Path, slots: int) -> Any:
    from img2img_server.bundle.adapter_files import LoraFiles
    from img2img_server.engine.cache import Cache
    from img2img_server.runtime.execution import Execution
    from img2img_server.runtime.loader import load_pipeline
    from img2img_server.runtime.lora.adapters import LoraSettings

    settings = LoraSettings(LoraFiles(folder), Cache(2**30), slots)
    pipeline: Any = load_pipeline(bundle, manifest, Execution("cpu"), Cache(2**26), loras=settings)
    graph, *_ = pipeline._denoiser.graphs
    for number in range(slots):
        _write([layer for layer in graph.layers if layer.taps == 1], folder / f"{number}.safetensors", number)
        _write(graph.layers, folder / f"{_KERNELS}{number}.safetensors", number)
    return pipeline


def _least_graph(pipeline: Any) -> Any:
    """The denoiser's LoRA graph, in calls without LoRAs."""
    from img2img_server.runtime.lora.graph import Unadapted
    from img2img_server.runtime.onnx.modules import Graph

    graph, *_ = pipeline._denoiser.graphs
    return Graph(Unadapted(graph._lora))


def _denoise_with(pipeline: Any, graph: Any, states: Any) -> Any:
    """A step by another graph of the denoiser."""
    denoiser = pipeline._denoiser
    own, denoiser._graph = denoiser._graph, graph
    try:
        return pipeline.denoise(states)
    finally:
        denoiser._graph = own


def _write(layers: Any, path: Path, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Any] = {}
    for layer in layers:
        side = math.isqrt(layer.taps)
        down = torch.randn(_RANK, layer.ins, *((side, side) if layer.is_conv else ()), generator=generator)
        down /= (layer.ins * layer.taps) ** 0.5
        up = torch.randn(layer.outs, _RANK, *((1, 1) if layer.is_conv else ()), generator=generator) * 0.05
        tensors |= {f"unet.{layer.name}.lora_A.weight": down, f"unet.{layer.name}.lora_B.weight": up}
    save_file(tensors, path)


def _states(pipeline: Any, folder: Path, rows: int, count: int, kind: str = "") -> Any:
    """The states of requests of one row each, with `count` different LoRAs of a kind, none for 0."""
    from img2img_server.bundle.adapter_files import LoraFiles
    from img2img_server.engine.request import LoraUse, Request
    from PIL import Image

    files, image = LoraFiles(folder), Image.new("RGB", pipeline.native_size, (90, 120, 60))
    requests = []
    for row in range(rows):
        name = f"{kind}{row % max(count, 1)}"
        loras = (LoraUse(name, 1.0, files.find(name).digest),) if count else ()
        requests.append(Request("m", image, "a lake", None, 1.0, 4, 1.0, (row,), loras=loras))
    return pipeline.prepare(requests)

"""Bundle -> pipeline: builds diffusers' own img2img class out of stand-ins or torch modules, and splits it by family."""

import os
from pathlib import Path
from typing import Any

import torch

from img2img_server.bundle import Manifest
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import Pipeline
from img2img_server.execution import Execution
from img2img_server.pipelines.components import Components
from img2img_server.pipelines.latent_consistency import LatentConsistency
from img2img_server.pipelines.runners import HostRunner
from img2img_server.pipelines.sessions import Open, SessionOptions, open_session, resolve_provider
from img2img_server.pipelines.stable_diffusion import StableDiffusion, StableDiffusionXL
from img2img_server.pipelines.torch_parts import torch_device, torch_pipeline
from img2img_server.pipelines.whole import WholePipeline

FAMILIES: dict[str, type[StableDiffusion]] = {
    "stable-diffusion": StableDiffusion,
    "stable-diffusion-xl": StableDiffusionXL,
    "latent-consistency": LatentConsistency,
}
"""The families that the engine runs step by step in batches. Every other one runs whole."""


def load_pipeline(
    bundle: Path,
    manifest: Manifest,
    execution: Execution | None = None,
    cache: Cache | None = None,
    open_graph: Open = open_session,
) -> Pipeline:
    """Loads the bundle in the directory `bundle`, whose manifest was read and checked before.

    `execution` says how to run it, None for the best that is there. `cache` keeps what was encoded of prompts and pictures;
    several pipelines may share one. `open_graph` opens the graphs.
    Raises BundleError where the bundle does not fit this server or the provider is not there.
    """
    execution = execution or Execution()
    threads = execution.threads or len(os.sched_getaffinity(0))
    pipe, engine = _build(bundle, manifest, execution.provider, threads, open_graph)
    # Where graphs do all the heavy work torch only steps schedulers: threads of its own would get in ONNX Runtime's way.
    torch_threads = 1 if manifest.backend == "onnx" else threads
    family = FAMILIES.get(manifest.family)
    pipeline: Pipeline
    if family is None:
        pipeline = WholePipeline(pipe, engine, torch_threads)
    else:
        pipeline = family(pipe, engine, torch_threads, cache or Cache(0), manifest.latent_preview)
    if manifest.size_multiple is not None:
        pipeline.size_multiple = manifest.size_multiple
    return pipeline


def _build(bundle: Path, manifest: Manifest, provider: str, threads: int, open_graph: Open) -> tuple[Any, str]:
    """The diffusers pipeline, and what runs it."""
    if manifest.backend == "torch":
        device = torch_device(provider)
        return torch_pipeline(bundle, manifest, device), f"torch:{device}"
    options = SessionOptions(resolve_provider(provider), threads)
    # All graphs take and give tensors on the CPU; only the torch modules of a hybrid are elsewhere.
    device = "cuda" if manifest.backend == "hybrid" and options.provider == "cuda" and torch.cuda.is_available() else "cpu"
    components = Components(
        bundle, manifest, lambda name, path: HostRunner(open_graph(path, options)), provider=options.provider, device=device
    )
    return components.pipeline(), f"{manifest.backend}:{options.provider}"

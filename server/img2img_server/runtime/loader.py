"""Bundle -> pipeline: builds diffusers' own img2img class out of ONNX modules or torch modules, and splits it by family."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from img2img_server.bundle.limits import Precision
from img2img_server.bundle.manifest import Manifest
from img2img_server.bundle.unsafe_files import refuse_unsafe
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import Pipeline
from img2img_server.errors import BundleError, OutOfMemory, ServerError
from img2img_server.runtime import accuracy_check
from img2img_server.runtime.common import cpu
from img2img_server.runtime.common.device_copy import device_stream, go_over
from img2img_server.runtime.common.out_of_memory import KEEPERS, is_out_of_memory
from img2img_server.runtime.common.vae import bound_torch_vaes, most_memory
from img2img_server.runtime.diffusion.latent_consistency import LatentConsistency
from img2img_server.runtime.diffusion.stable_diffusion import StableDiffusion, StableDiffusionXL
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.onnx.components import Components
from img2img_server.runtime.onnx.graph_sizes import Sizes
from img2img_server.runtime.onnx.placement import Placement
from img2img_server.runtime.onnx.providers import ERRORS, Choice, Probe, choose
from img2img_server.runtime.onnx.runners import HostRunner, Make
from img2img_server.runtime.onnx.sessions import Open, SessionOptions, last_line, open_session
from img2img_server.runtime.opaque.pipeline import OpaquePipeline
from img2img_server.runtime.providers import openvino
from img2img_server.runtime.torch.compile import compile_modules
from img2img_server.runtime.torch.load import choose_dtype, torch_device, torch_pipeline

_log = logging.getLogger(__name__)

FAMILIES: dict[str, type[StableDiffusion]] = {
    "stable-diffusion": StableDiffusion,
    "stable-diffusion-xl": StableDiffusionXL,
    "latent-consistency": LatentConsistency,
}
"""The families that the engine runs step by step in batches. Every other one runs whole."""

_FEW_BYTES = 2**28
"""Of torch's tensors on a GPU: what is less than this is no model."""

_PRECISIONS: dict[torch.dtype, Precision] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_DOES_NOT_DRAW = (*ERRORS, BundleError, ServerError, RuntimeError, FloatingPointError)
"""What a pipeline raises, when it is judged, that computes in a way which does not work here."""


def load_pipeline(
    bundle: Path,
    manifest: Manifest,
    execution: Execution | None = None,
    cache: Cache | None = None,
    open_graph: Open = open_session,
    keep: Callable[[Make], Make] = lambda make: make,
) -> Pipeline:
    """Loads the bundle in the directory `bundle`, whose manifest was read and checked before.

    `execution` says how to run it, None for the best that is there. `cache` keeps what was encoded of prompts and images;
    several pipelines may share one. `open_graph` opens the graphs; `keep` is given what readies them for a GPU or the CPU, to
    remember what it made.
    Raises BundleError where the bundle does not fit this server or the provider is not there.
    """
    refuse_unsafe(bundle)
    execution = execution or Execution()
    threads = execution.threads or cpu.count()
    cache = cache or Cache(0)
    if manifest.backend == "torch":
        return _load_torch(bundle, manifest, execution, threads, cache)
    return _load_graphs(bundle, manifest, execution, threads, cache, choose(execution.provider), open_graph, keep)


def _load_graphs(
    bundle: Path,
    manifest: Manifest,
    execution: Execution,
    threads: int,
    cache: Cache,
    choice: Choice,
    open_graph: Open,
    keep: Callable[[Make], Make],
) -> Pipeline:
    """On the provider that was chosen. If that was left to the server and the GPU does not run the bundle: on the CPU."""
    placement = Placement(bundle, manifest, choice, open_graph)
    if choice.provider == "openvino":
        return _load_openvino(bundle, manifest, execution, threads, cache, placement)
    # What runs whole has a thread for each request, and recorded calls belong to one thread.
    graphs = execution.cuda_graphs and manifest.family in FAMILIES
    try:
        make, provider, tensors = _runners(choice, replace(execution, cuda_graphs=graphs), threads, placement.open, Sizes(bundle))
        return assemble(bundle, manifest, keep(placement.logged(make)), provider, tensors, threads, cache, execution)
    except BundleError as error:
        if choice.provider == "cpu":
            raise
        if is_out_of_memory(error) and _is_shared(bundle):
            raise OutOfMemory(f"the GPU has no memory for {bundle.name} beside what is loaded: {last_line(error)}") from error
        if execution.provider != "auto":
            raise
        why = last_line(error)
        _log.warning("%s: runs on the CPU, not on the GPU: %s", bundle.name, why)
        declined = (*choice.declined, Probe(choice.provider, problem=why))
        choice = Choice("cpu", declined=declined)
    return _load_graphs(bundle, manifest, execution, threads, cache, choice, open_graph, keep)


def _is_shared(bundle: Path) -> bool:
    """Whether other models than that of `bundle` take memory of the GPU: without them it might have enough."""
    others = any(keeper.owner not in (bundle, None) for keeper in KEEPERS)
    return others or (torch.cuda.is_available() and torch.cuda.memory_allocated() > _FEW_BYTES)


def assemble(
    bundle: Path,
    manifest: Manifest,
    make: Make,
    provider: str,
    tensors: str,
    threads: int,
    cache: Cache,
    execution: Execution | None = None,
) -> Pipeline:
    """A pipeline of the bundle's graphs, each readied by `make`.

    `provider` is what answers say ran them, and picks between a graph and its fused twin (components.py). `tensors`, "cpu" or
    "cuda", is where `make`'s runners want tensors; the latents and a hybrid's torch modules are there too. `execution` says
    whether those are compiled, and what the VAE may take. Raises BundleError.
    """
    execution = execution or Execution()
    memory = most_memory(execution, tensors)
    components = Components(bundle, manifest, make, provider=provider, device=tensors, tensors=tensors, vae_memory=memory)
    return _split(bundle, components.pipeline(), f"{manifest.backend}:{provider}", manifest, execution, threads, cache)


def _runners(choice: Choice, execution: Execution, threads: int, open_graph: Open, sizes: Sizes) -> tuple[Make, str, str]:
    """What readies graphs for the provider, its name in answers, and where tensors are to be."""
    if choice.provider == "cpu":
        options = SessionOptions("cpu", threads)
        return lambda name, graph: HostRunner(open_graph(graph, options)), "cpu", "cpu"
    from img2img_server.runtime.providers import cuda

    # TensorRT begins with CUDA, too: its engines are built while that serves.
    return cuda.runners(execution, threads, open_graph, sizes), "cuda", cuda.tensor_device()


def _load_openvino(
    bundle: Path, manifest: Manifest, execution: Execution, threads: int, cache: Cache, placement: Placement
) -> Pipeline:
    """In bfloat16 where that is there and its images pass, else in float32."""

    def load(execution: Execution) -> Pipeline:
        arithmetic = openvino.arithmetic(execution)
        make = openvino.runners(execution, threads, bundle, manifest, placement.open, arithmetic)
        return assemble(bundle, manifest, placement.logged(make), "openvino", "cpu", threads, cache, execution)

    if openvino.arithmetic(execution) == "f32" or manifest.precision == "bf16":
        return load(execution)
    return _judged(bundle, manifest, "bf16", lambda: load(execution), lambda: load(replace(execution, arithmetic="fp32")))


def _load_torch(bundle: Path, manifest: Manifest, execution: Execution, threads: int, cache: Cache) -> Pipeline:
    """OpenVINO and TensorRT run graphs: beside them PyTorch takes the same device."""
    if execution.provider == "openvino":
        choose(execution.provider)
    device = torch_device({"openvino": "cpu", "tensorrt": "cuda"}.get(execution.provider, execution.provider))

    def load(dtype: torch.dtype) -> Pipeline:
        if device == "cuda":
            go_over(device_stream())
        why = manifest.backend_reason or "it has no graphs"
        _log.info("%s: all of it runs in PyTorch on %s in %s, %d threads: %s", bundle.name, device, dtype, threads, why)
        try:
            pipe = torch_pipeline(bundle, manifest, device, dtype)
        except BundleError as error:
            if device == "cuda" and is_out_of_memory(error):
                raise OutOfMemory(f"the GPU has no memory for {bundle.name}: {last_line(error)}") from error
            raise
        return _split(bundle, pipe, f"torch:{device}", manifest, execution, threads, cache)

    dtype = choose_dtype(device, execution)
    if dtype == torch.float32:
        return load(dtype)
    return _judged(bundle, manifest, _PRECISIONS[dtype], lambda: load(dtype), lambda: load(torch.float32))


def _judged(
    bundle: Path, manifest: Manifest, precision: Precision, quick: Callable[[], Pipeline], exact: Callable[[], Pipeline]
) -> Pipeline:
    """The `quick` pipeline, which computes in `precision`, if it draws the bundle's reference images; else the `exact` one."""
    try:
        pipeline = quick()
        verdict = accuracy_check.judge(pipeline, bundle, manifest, accuracy_check.least_psnr_db(precision))
    except OutOfMemory:
        # In float32 it takes more.
        raise
    except _DOES_NOT_DRAW as error:
        verdict = accuracy_check.Verdict(False, f"it does not run: {error}".splitlines()[0])
    if verdict.passed:
        _log.info("%s: computes in %s, PSNR of its reference pictures %.1f dB", bundle.name, precision, verdict.psnr_db)
        return pipeline
    _log.warning("%s: computes in fp32 and not in %s: %s", bundle.name, precision, verdict.problem)
    # Before the other is loaded: they need not fit into memory together.
    pipeline = None  # type: ignore[assignment]
    return exact()


def _split(
    bundle: Path, pipe: Any, engine: str, manifest: Manifest, execution: Execution, threads: int, cache: Cache
) -> Pipeline:
    """A diffusers pipeline as the engine runs it: step by step where its family can be."""
    # Where graphs do all the heavy work torch only steps schedulers: threads of its own would get in ONNX Runtime's way.
    torch_threads = 1 if manifest.backend == "onnx" else threads
    family = FAMILIES.get(manifest.family)
    pipeline: StableDiffusion | OpaquePipeline
    if family is None:
        pipeline = OpaquePipeline(pipe, engine, torch_threads)
    else:
        pipeline = family(pipe, engine, torch_threads, cache, manifest.latent_preview)
    bound_torch_vaes(pipe, most_memory(execution, torch.device(pipe.device).type))
    pipeline.owner = bundle
    if manifest.size_multiple is not None:
        pipeline.size_multiple = manifest.size_multiple
    if execution.compile and manifest.backend != "onnx":
        compile_modules(pipe, pipeline)
    return pipeline

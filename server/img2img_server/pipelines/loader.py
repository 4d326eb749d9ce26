"""Bundle -> pipeline: builds diffusers' own img2img class out of stand-ins or torch modules, and splits it by family."""

import inspect
import json
import os
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from img2img_server.bundle import Manifest
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import Pipeline
from img2img_server.errors import BundleError
from img2img_server.pipelines.sessions import SessionOptions, resolve_provider
from img2img_server.pipelines.stable_diffusion import StableDiffusion, StableDiffusionXL
from img2img_server.pipelines.standins import OnnxTextEncoder, OnnxUNet, OnnxVae
from img2img_server.pipelines.whole import WholePipeline

FAMILIES: dict[str, type[StableDiffusion]] = {
    "stable-diffusion": StableDiffusion,
    "stable-diffusion-xl": StableDiffusionXL,
}
"""The families that the engine runs step by step in batches. Every other one runs whole."""

_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_LOAD_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError)
"""What diffusers and transformers raise for files that they cannot make sense of."""


def load_pipeline(
    bundle: Path, manifest: Manifest, provider: str = "auto", threads: int | None = None, cache: Cache | None = None
) -> Pipeline:
    """Loads the bundle in the directory `bundle`, whose manifest was read and checked before.

    `provider` is "auto" or the name of an execution provider, `threads` the CPU threads of one call (None: all cores).
    `cache` keeps what was encoded of prompts and pictures; several pipelines may share one.
    Raises BundleError where the bundle does not fit this server or the provider is not there.
    """
    threads = threads or len(os.sched_getaffinity(0))
    if manifest.backend == "onnx":
        options = SessionOptions(resolve_provider(provider), threads)
        pipe = _onnx_pipeline(bundle, manifest, options)
        engine = f"onnx:{options.provider}"
        # The graphs do the heavy work. Torch only steps schedulers: threads of its own would get in ONNX Runtime's way.
        torch_threads = 1
    else:
        device = _torch_device(provider)
        pipe = _torch_pipeline(bundle).to(device)
        engine = f"torch:{device}"
        torch_threads = threads
    family = FAMILIES.get(manifest.family)
    if family is None:
        return WholePipeline(pipe, engine, torch_threads)
    return family(pipe, engine, torch_threads, cache or Cache(0), manifest.latent_preview)


def _onnx_pipeline(bundle: Path, manifest: Manifest, options: SessionOptions) -> Any:
    """The img2img class that the manifest names, with a stand-in for each component that is a graph."""
    if manifest.family not in FAMILIES:
        raise BundleError(f"{bundle} is of family '{manifest.family}', which this server cannot run from ONNX graphs")
    pipeline_class = getattr(diffusers, manifest.pipeline_class, None)
    if pipeline_class is None:
        raise BundleError(f"{bundle} wants '{manifest.pipeline_class}', which diffusers {diffusers.__version__} lacks")
    index = json.loads((bundle / "model_index.json").read_text(encoding="utf-8"))
    wanted = inspect.signature(pipeline_class.__init__).parameters
    parts = {name: _part(bundle, name, entry, options) for name, entry in index.items() if name in wanted}
    if "add_watermarker" in wanted:
        parts["add_watermarker"] = False
    missing = [name for name, item in wanted.items() if name != "self" and item.default is item.empty and name not in parts]
    return pipeline_class(**parts, **dict.fromkeys(missing))


def _part(bundle: Path, name: str, entry: Any, options: SessionOptions) -> Any:
    """One argument of the pipeline's class: a setting, a stand-in, or what diffusers or transformers load from a folder."""
    if not isinstance(entry, list):
        return entry
    library, class_name = entry
    if class_name is None or not _is_there(bundle, name):
        return None
    if name == "vae":
        return OnnxVae(bundle / "vae_encoder", bundle / "vae_decoder", options)
    if name == "unet":
        return OnnxUNet(bundle / name, options)
    if name.startswith("text_encoder"):
        return OnnxTextEncoder(bundle / name, options)
    if library not in _LIBRARIES:
        raise BundleError(f"{bundle} names {library}.{class_name}; only classes of diffusers and transformers are loaded")
    try:
        return getattr(_LIBRARIES[library], class_name).from_pretrained(bundle / name, local_files_only=True)
    except _LOAD_ERRORS as error:
        raise BundleError(f"{bundle / name} does not load: {error}") from error


def _is_there(bundle: Path, name: str) -> bool:
    # The safety checker is no part of an ONNX bundle, though model_index.json may still name it.
    return (bundle / ("vae_decoder" if name == "vae" else name)).is_dir()


def _torch_device(provider: str) -> str:
    if provider not in ("auto", "cuda", "cpu"):
        raise BundleError(f"PyTorch has no provider '{provider}'")
    there = torch.cuda.is_available()
    if provider == "cuda" and not there:
        raise BundleError("provider 'cuda' was asked for, and PyTorch finds no CUDA device")
    return "cuda" if there and provider != "cpu" else "cpu"


def _torch_pipeline(bundle: Path) -> Any:
    try:
        return diffusers.AutoPipelineForImage2Image.from_pretrained(
            str(bundle), use_safetensors=True, local_files_only=True, torch_dtype=torch.float32
        )
    except _LOAD_ERRORS as error:
        raise BundleError(f"{bundle} does not load: {error}") from error

"""Bundle -> pipeline: builds diffusers' img2img class from ONNX modules or torch modules, and wraps it for the engine."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from img2img_server.bundle import controls, image_encoders
from img2img_server.bundle.companions import FAMILIES as COMPANIONS
from img2img_server.bundle.component_config import CONFIG_NAME, read_config, reading
from img2img_server.bundle.image_prompts import layer_widths
from img2img_server.bundle.manifest import WEIGHT_BYTES, Manifest, Precision, TensorSpec
from img2img_server.bundle.unsafe_files import refuse_unsafe
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import Pipeline
from img2img_server.errors import BundleError, OutOfMemory
from img2img_server.runtime import accuracy_check, measured_choice
from img2img_server.runtime.common import cpu
from img2img_server.runtime.common.device_copy import device_stream, go_over
from img2img_server.runtime.common.out_of_memory import KEEPERS, is_out_of_memory
from img2img_server.runtime.common.vae import bound_torch_vaes, most_memory
from img2img_server.runtime.companions import Companion, Companions
from img2img_server.runtime.control.controls import ModelControls, NoControls
from img2img_server.runtime.control.nets import open_controlnet
from img2img_server.runtime.control.own import OwnControl
from img2img_server.runtime.diffusion.chroma import Chroma
from img2img_server.runtime.diffusion.flux import Flux, FluxControl
from img2img_server.runtime.diffusion.flux_2 import Flux2, Flux2Klein, FluxKontext
from img2img_server.runtime.diffusion.inpainting import FluxFill, StableDiffusionInpainting, StableDiffusionXLInpainting
from img2img_server.runtime.diffusion.latent_consistency import LatentConsistency
from img2img_server.runtime.diffusion.light import LIGHT
from img2img_server.runtime.diffusion.longcat import LongCatImageEdit
from img2img_server.runtime.diffusion.qwen_image import QwenImage, QwenImageEdit, QwenImageEditPlus
from img2img_server.runtime.diffusion.stable_diffusion import StableDiffusion, StableDiffusionXL
from img2img_server.runtime.diffusion.stable_diffusion_3 import StableDiffusion3, StableDiffusion3Tokens
from img2img_server.runtime.diffusion.stepped import SteppedPipeline
from img2img_server.runtime.diffusion.z_image import ZImage
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.image_encoders import ImageEncoder
from img2img_server.runtime.image_prompts.prompts import ImageAdapterSettings, ModelImagePrompts, NoImagePrompts
from img2img_server.runtime.lora.adapters import LoraSettings, ModelLoras, NoLoras
from img2img_server.runtime.lora.graph import layers_of
from img2img_server.runtime.onnx.components import Components
from img2img_server.runtime.onnx.graph_sizes import Sizes
from img2img_server.runtime.onnx.placement import Placement
from img2img_server.runtime.onnx.providers import Probe, ProviderChoice, choose
from img2img_server.runtime.onnx.runners import HostRunner, Make
from img2img_server.runtime.onnx.sessions import Open, SessionOptions, last_line, open_session
from img2img_server.runtime.onnx.token_graphs import PLACES
from img2img_server.runtime.opaque.pipeline import OpaquePipeline
from img2img_server.runtime.providers import openvino
from img2img_server.runtime.torch.compile import compile_modules
from img2img_server.runtime.torch.load import choose_dtype, torch_device, torch_pipeline

_log = logging.getLogger(__name__)

FAMILIES: dict[str, type[SteppedPipeline]] = {
    "stable-diffusion": StableDiffusion,
    "stable-diffusion-xl": StableDiffusionXL,
    "stable-diffusion-inpainting": StableDiffusionInpainting,
    "stable-diffusion-xl-inpainting": StableDiffusionXLInpainting,
    "latent-consistency": LatentConsistency,
    "stable-diffusion-3": StableDiffusion3,
    "flux": Flux,
    "flux-control": FluxControl,
    "flux-fill": FluxFill,
    "chroma": Chroma,
    "flux-kontext": FluxKontext,
    "flux-2": Flux2,
    "flux-2-klein": Flux2Klein,
    "qwen-image": QwenImage,
    "qwen-image-edit": QwenImageEdit,
    "qwen-image-edit-plus": QwenImageEditPlus,
    "z-image": ZImage,
    "longcat-image-edit": LongCatImageEdit,
}
"""The families that the engine batches step by step. All others are opaque pipelines."""

_ONCE_WHOLE = {"StableDiffusion3Img2ImgPipeline": "stable-diffusion-3", "FluxImg2ImgPipeline": "flux"}
"""The families of classes whose bundles were exported as "whole" before the engine could step them."""

_FEW_BYTES = 2**28
"""If torch's tensors on the GPU take less than this, no other model is loaded there."""

_MOST_NATIVE = 8192
"""Maximum width and height in pixels of the images that a model was trained on. Its trial image has this size."""

_PRECISIONS: dict[torch.dtype, Precision] = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, slots=True)
class Loading:
    """The arguments of a load: the bundle in a directory, and its manifest, which was read and checked before.

    `cache` keeps encoded prompts and images; several pipelines may share one. `loras` are the LoRAs that requests may name, None
    for none, and so are `image_adapters`. `companions` are those in memory, such as ControlNets, to which the bundle of one is
    added.
    """

    bundle: Path
    manifest: Manifest
    execution: Execution = field(default_factory=Execution)
    cache: Cache = field(default_factory=lambda: Cache(0))
    loras: LoraSettings | None = None
    companions: Companions | None = None
    image_adapters: ImageAdapterSettings | None = None

    @property
    def threads(self) -> int:
        """The number of CPU threads of one call."""
        return self.execution.threads or cpu.count()

    @property
    def family(self) -> type[SteppedPipeline] | None:
        """The family that steps the bundle, None for one that runs whole."""
        return family_of(self.manifest)


def load_pipeline(
    bundle: Path,
    manifest: Manifest,
    execution: Execution | None = None,
    cache: Cache | None = None,
    open_graph: Open = open_session,
    keep: Callable[[Make], Make] = lambda make: make,
    loras: LoraSettings | None = None,
    companions: Companions | None = None,
    image_adapters: ImageAdapterSettings | None = None,
) -> Pipeline:
    """Loads a bundle; `Loading` has the arguments that are not described here.

    `execution` says how to run it, None for the defaults. `open_graph` opens ONNX files; `keep` wraps the function that makes
    runners for a GPU or the CPU, to keep references to them.
    Raises BundleError if the bundle does not fit this server or the provider is not available, OutOfMemory if the GPU is full.
    """
    refuse_unsafe(bundle)
    loading = Loading(bundle, manifest, execution or Execution(), cache or Cache(0), loras, companions, image_adapters)
    if manifest.backend == "torch":
        return _load_torch(loading)
    choice = choose(loading.execution.provider)
    if manifest.family in COMPANIONS and choice.provider == "openvino":
        choice = replace(choice, provider="cpu", detail="")  # as control graphs are
    return _load_graphs(loading, choice, open_graph, keep)


def _load_graphs(loading: Loading, choice: ProviderChoice, open_graph: Open, keep: Callable[[Make], Make]) -> Pipeline:
    """Loads an ONNX bundle on the chosen provider; if the provider is "auto" and the GPU does not run the bundle, on the CPU."""
    bundle, manifest, execution = loading.bundle, loading.manifest, loading.execution
    placement = Placement(bundle, manifest, choice, open_graph)
    if choice.provider == "openvino":
        ways: dict[str, Callable[[], Pipeline]] = {"onnx:openvino": lambda: _load_openvino(loading, placement)}
        if execution.provider == "auto":
            on_cpu = replace(choice, provider="cpu", detail="")
            ways = {"onnx:cpu": lambda: _load_graphs(loading, on_cpu, open_graph, keep), **ways}
        return measured_choice.fastest(bundle, manifest, execution, loading.threads, ways)
    # An opaque pipeline uses several threads, and recorded calls belong to one thread.
    graphs = execution.cuda_graphs and (loading.family is not None or manifest.family == controls.FAMILY)
    try:
        recording = replace(execution, cuda_graphs=graphs)
        make, provider, tensors = _runners(choice, recording, loading.threads, placement.open, Sizes(bundle))
        return assemble(loading, keep(placement.logged(make)), provider, tensors)
    except BundleError as error:
        if choice.provider == "cpu":
            raise
        if is_out_of_memory(error) and _is_shared(bundle):
            raise OutOfMemory(f"not enough GPU memory for {bundle.name} beside the loaded models: {last_line(error)}") from error
        if execution.provider != "auto":
            raise
        why = last_line(error)
        _log.warning("%s: runs on the CPU, not on the GPU: %s", bundle.name, why)
        declined = (*choice.declined, Probe(choice.provider, problem=why))
        choice = ProviderChoice("cpu", declined=declined)
    return _load_graphs(loading, choice, open_graph, keep)


def _is_shared(bundle: Path) -> bool:
    """Whether models other than `bundle` take GPU memory, so that evicting them could help."""
    others = any(keeper.owner not in (bundle, None) for keeper in KEEPERS)
    return others or (torch.cuda.is_available() and torch.cuda.memory_allocated() > _FEW_BYTES)


def assemble(loading: Loading, make: Make, provider: str, tensors: str) -> Pipeline:
    """Builds a pipeline of the bundle's graphs, with the runners that `make` makes.

    `provider` is the name reported in results; it also selects between a graph and its fused variant (components.py). `tensors`,
    "cpu" or "cuda", is where the runners expect tensors, and where the latents and a hybrid's torch modules are placed.
    Raises BundleError.
    """
    manifest, execution, is_stepped = loading.manifest, loading.execution, loading.family is not None
    components = Components(
        loading.bundle, manifest, make, provider=provider, device=tensors, tensors=tensors,
        vae_memory=most_memory(execution, tensors), lora_slots=loading.loras.slots if loading.loras and is_stepped else 0,
        light=LIGHT if is_stepped else {}, compiles=execution.compile, offloads=execution.offloads, is_stepped=is_stepped,
    )  # fmt: skip
    engine = f"{manifest.backend}:{provider}"
    if manifest.family in COMPANIONS:
        return _companion(components, engine, tensors, loading.companions)
    return _split(loading, components.pipeline(), engine)


def _companion(components: Components, engine: str, device: str, companions: Companions | None) -> Companion:
    """Opens a companion, and adds it to `companions` by its model's id."""
    manifest, graph = components.manifest, components.companion()
    config = read_config(components.bundle / manifest.family)
    companion: Companion
    with reading(config):
        if manifest.family == image_encoders.FAMILY:
            companion = ImageEncoder(graph, config, manifest.digest, engine, device, companions)
        else:
            companion = open_controlnet(graph, config, engine, device, companions, _parameters(manifest, manifest.family))
    companion.owner = components.bundle
    if companions is not None:
        companions.add(components.bundle.absolute().name, companion)
    return companion


def _runners(choice: ProviderChoice, execution: Execution, threads: int, open_graph: Open, sizes: Sizes) -> tuple[Make, str, str]:
    """The function that makes the provider's runners, the provider's name in results, and the device of tensors."""
    if choice.provider == "cpu":
        options = SessionOptions("cpu", threads)
        return lambda name, graph: HostRunner(open_graph(graph, options)), "cpu", "cpu"
    from img2img_server.runtime.providers import cuda

    # TensorRT starts with CUDA, too: CUDA serves while TensorRT's engines are built.
    return cuda.runners(execution, threads, open_graph, sizes), "cuda", cuda.tensor_device()


def _load_openvino(loading: Loading, placement: Placement) -> Pipeline:
    """Loads in bfloat16 if the CPU supports it and the accuracy check passes, else in float32."""

    def load(execution: Execution) -> Pipeline:
        arithmetic, root = openvino.arithmetic(execution), measured_choice.cache_root(execution)
        make = openvino.runners(execution, loading.threads, loading.bundle, loading.manifest, placement.open, arithmetic, root)
        return assemble(replace(loading, execution=execution), placement.logged(make), "openvino", "cpu")

    execution = loading.execution
    if openvino.arithmetic(execution) == "f32":
        return load(execution)
    return _judged(loading, "bf16", lambda: load(execution), lambda: load(replace(execution, arithmetic="fp32")))


def _load_torch(loading: Loading) -> Pipeline:
    """Loads a torch bundle. OpenVINO and TensorRT run only graphs; with them PyTorch uses the same device."""
    bundle, manifest, execution = loading.bundle, loading.manifest, loading.execution
    if execution.provider == "openvino":
        choose(execution.provider)
    device = torch_device({"openvino": "cpu", "tensorrt": "cuda"}.get(execution.provider, execution.provider))

    def load(dtype: torch.dtype) -> Pipeline:
        if device == "cuda":
            go_over(device_stream())
        why = manifest.backend_reason or "the bundle has no graphs"
        _log.info("%s: runs in PyTorch on %s in %s, %d threads: %s", bundle.name, device, dtype, loading.threads, why)
        try:
            pipe = torch_pipeline(bundle, manifest, device, dtype, execution.offloads)
        except BundleError as error:
            if device == "cuda" and is_out_of_memory(error):
                raise OutOfMemory(f"not enough GPU memory for {bundle.name}: {last_line(error)}") from error
            raise
        return _split(loading, pipe, f"torch:{device}")

    dtype = choose_dtype(device, execution)
    if dtype == torch.float32:
        return load(dtype)

    def quick() -> Pipeline:
        return _judged(loading, _PRECISIONS[dtype], lambda: load(dtype), lambda: load(torch.float32))

    if device != "cpu":
        return quick()
    ways: dict[str, Callable[[], Pipeline]] = {"PyTorch in fp32": lambda: load(torch.float32)}
    ways[f"PyTorch in {_PRECISIONS[dtype]}"] = quick
    return measured_choice.fastest(bundle, manifest, execution, loading.threads, ways)


def _judged(loading: Loading, precision: Precision, quick: Callable[[], Pipeline], exact: Callable[[], Pipeline]) -> Pipeline:
    """Loads the `quick` pipeline, which computes in `precision`; if it fails the accuracy check, the `exact` one instead."""
    bundle, manifest = loading.bundle, loading.manifest
    held: list[Pipeline] = []
    try:
        held.append(quick())
        verdict = accuracy_check.judge(held[0], bundle, manifest, accuracy_check.least_psnr_db(precision, manifest.weight_format))
    except OutOfMemory:
        # float32 takes even more memory.
        measured_choice.free(held)
        raise
    except accuracy_check.CANNOT_DRAW as error:
        verdict = accuracy_check.Verdict(False, f"the pipeline does not run: {error}".splitlines()[0])
    if verdict.passed:
        _log.info("%s: computes in %s, PSNR of its reference images %.1f dB", bundle.name, precision, verdict.psnr_db)
        return held.pop()
    _log.warning("%s: computes in fp32 and not in %s: %s", bundle.name, precision, verdict.problem)
    # Before the other one is loaded: both need not fit into memory.
    measured_choice.free(held)
    return exact()


def family_of(manifest: Manifest) -> type[SteppedPipeline] | None:
    """The family that steps a bundle. None for one that runs whole, such as one whose graph takes one timestep for all rows."""
    once_whole = _ONCE_WHOLE.get(manifest.pipeline_class, "")
    inputs = [item for part in manifest.components for item in part.inputs]
    per_row = all(_has_rows(item) for item in inputs if item.name == "timestep")
    family = FAMILIES.get(manifest.family) or (FAMILIES.get(once_whole) if per_row else None)
    has_tokens = any(item.name == PLACES for item in inputs)
    return StableDiffusion3Tokens if family is StableDiffusion3 and has_tokens else family


def _has_rows(item: TensorSpec) -> bool:
    return bool(item.shape) and isinstance(item.shape[0], str)


def _split(loading: Loading, pipe: Any, engine: str) -> Pipeline:
    """Wraps a diffusers pipeline for the engine: step by step if its family supports it, else as an opaque pipeline."""
    bundle, manifest, execution, family = loading.bundle, loading.manifest, loading.execution, loading.family
    # If graphs do all the heavy work, torch only steps schedulers; more threads of torch would compete with ONNX Runtime's.
    threads = 1 if manifest.backend == "onnx" else loading.threads
    pipeline: SteppedPipeline | OpaquePipeline
    if family is None:
        pipeline = OpaquePipeline(pipe, engine, threads)
    else:
        loras = _loras(bundle, pipe, manifest, family, loading.loras)
        controls = _controls(pipe, manifest, family, loading.companions)
        prompts = _image_prompts(pipe, family, loading)
        cache, preview, speedups = loading.cache, manifest.latent_preview, manifest.speedups
        pipeline = family(pipe, engine, threads, cache, preview, loras, speedups, controls, prompts)
    if max(width_and_height := pipeline.native_size) > _MOST_NATIVE:
        config = bundle / ("unet" if hasattr(pipe, "unet") else "transformer") / CONFIG_NAME
        drawn = " x ".join(map(str, width_and_height))
        raise BundleError(f"{config}: with its 'sample_size' the model draws {drawn} pixels, more than {_MOST_NATIVE} on a side")
    bound_torch_vaes(pipe, most_memory(execution, torch.device(pipe.device).type))
    pipeline.owner = bundle
    if manifest.size_multiple is not None:
        pipeline.size_multiple = manifest.size_multiple
    if execution.compile and manifest.backend != "onnx":
        compile_modules(pipe, pipeline)
    return pipeline


def _loras(
    bundle: Path, pipe: Any, manifest: Manifest, family: type[SteppedPipeline], loras: LoraSettings | None
) -> ModelLoras | NoLoras:
    """The LoRAs of a model whose pipeline is `pipe`."""
    if manifest.backend == "torch":
        return NoLoras("runs in PyTorch, not as graphs")
    if loras is None:
        return NoLoras("was loaded without a folder of LoRAs")
    layers = layers_of(pipe)
    if family.denoiser_name not in layers:
        reason = next((part.reason for part in manifest.components if part.name == family.denoiser_name), "")
        why = f" ({reason})" if "no lora graph" in reason.lower() else ": export it again with this version of img2img"
        return NoLoras(f"has no LoRA graph{why}")
    unet = bundle / "unet"
    config = read_config(unet) if unet.is_dir() else None
    return ModelLoras(loras, manifest.pipeline_class, tuple(pipe.components), config, layers)


def _controls(
    pipe: Any, manifest: Manifest, family: type[SteppedPipeline], companions: Companions | None
) -> ModelControls | OwnControl | NoControls:
    """The controls of a model whose pipeline is `pipe`."""
    if family.reads_control:
        return OwnControl()
    if not family.takes_controls:
        return NoControls(f"is of the family {manifest.family}, for which there are no ControlNets")
    if manifest.backend == "torch":
        return NoControls("runs in PyTorch, not as graphs")
    if companions is None:
        return NoControls("was loaded without ControlNets")
    denoiser = getattr(pipe, family.denoiser_name)
    if getattr(denoiser, "control", None) is None:
        part = next((part for part in manifest.components if part.name == family.denoiser_name), None)
        if part is not None and part.precision == "int8":
            return NoControls(f"has no control graph: its {family.denoiser_name} is in int8")
        why = f" ({part.reason})" if part is not None and "no control" in part.reason.lower() else ""
        how = "--control-graphs" if family.denoiser_name == "transformer" else "this version of img2img"
        return NoControls(f"has no control graph{why or f': export it again with {how}'}")
    if denoiser.tokens is None and family.denoiser_name == "transformer":
        return NoControls("has a control graph of an older version of img2img: export it again with --control-graphs")
    with reading(denoiser.config):
        return ModelControls(companions, denoiser, int(pipe.vae_scale_factor), _parameters(manifest, family.denoiser_name))


def _image_prompts(pipe: Any, family: type[SteppedPipeline], loading: Loading) -> ModelImagePrompts | NoImagePrompts:
    """The image prompts of a model whose pipeline is `pipe`."""
    manifest, denoiser = loading.manifest, getattr(pipe, family.denoiser_name)
    if manifest.backend == "torch":
        return NoImagePrompts("runs in PyTorch, not as graphs")
    with reading(denoiser.config):
        widths = layer_widths(denoiser.config)
    if not widths:
        return NoImagePrompts(f"is of the family {manifest.family}, for which there are no image adapters")
    if loading.image_adapters is None or loading.companions is None:
        return NoImagePrompts("was loaded without a folder of image adapters")
    control = getattr(denoiser, "control", None)
    if control is None or not control.image_prompts:
        return NoImagePrompts("has no control graph that takes them: export it again with this version of img2img")
    return ModelImagePrompts(loading.image_adapters, loading.companions, loading.cache, denoiser.config, control)


def _parameters(manifest: Manifest, component: str) -> float:
    """The number of weights of a component, about."""
    part = next(part for part in manifest.components if part.name == component)
    return max(part.bytes, 1) / WEIGHT_BYTES.get(part.precision, 4)

"""A bundle's components -> a diffusers pipeline: an ONNX module for each graph, diffusers' own module for the others."""

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from img2img_server.bundle.component_config import read_object
from img2img_server.bundle.files import DAMAGED
from img2img_server.bundle.manifest import FUSED_ATTENTION, Component, Manifest, WeightFormat
from img2img_server.errors import BundleError
from img2img_server.runtime.common import clip_tokenizer
from img2img_server.runtime.common.clip_tokenizer import LightCLIPTokenizer
from img2img_server.runtime.common.diffusers_import import diffusers
from img2img_server.runtime.common.fp32_compute import compute_in_fp32
from img2img_server.runtime.common.offload import offload
from img2img_server.runtime.common.processors import loadable
from img2img_server.runtime.common.weight_budget import within
from img2img_server.runtime.lora.graph import AdaptedGraph, Unadapted
from img2img_server.runtime.onnx.modules import Graph, LaterGraph, OnnxDenoiser, OnnxTextEncoder, OnnxVae
from img2img_server.runtime.onnx.runners import CONTROL_RUNNER, LIGHT_RUNNER, LORA_RUNNER, Make
from img2img_server.runtime.onnx.vision import TOWER, OnnxSeeingTextEncoder
from img2img_server.runtime.schedulers import registry

_log = logging.getLogger(__name__)

_GRAPH = "model.onnx"
_LIBRARIES = ("diffusers", "transformers")
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""The types of weights in half precision."""
LOAD_ERRORS = (*DAMAGED, RuntimeError, ImportError, AssertionError, StrictDataclassError)
"""Errors that diffusers and transformers raise for invalid files."""


@dataclass(frozen=True, slots=True)
class Components:
    """The components of a bundle, opened one by one.

    `make` makes runners for `provider`. `tensors` is the device on which runners expect tensors, `device` that of the pipeline's
    tensors and torch modules: "cpu" or "cuda". A VAE call takes at most `vae_memory` bytes, None for no bound. With
    `lora_slots` LoRA graphs are opened, too, for so many different LoRAs in a call. `light` has pipelines that replace diffusers'
    classes (diffusion/light.py), by their names. torch modules keep their weights in the bundle's precision and compute in fp32;
    with `compiles` (torch.compile, which cannot have that) their weights are fp32. On a GPU the weights of components of which
    `offloads` is true stay in host memory. If the engine steps the pipeline (`is_stepped`), nothing reads the logits of text
    encoders in PyTorch, and they are not computed: for Qwen3-4B a tenth of the products.
    """

    bundle: Path
    manifest: Manifest
    make: Make
    provider: str = "cpu"
    device: str = "cpu"
    tensors: str = "cpu"
    vae_memory: int | None = None
    lora_slots: int = 0
    light: Mapping[str, Any] = field(default_factory=dict)
    compiles: bool = False
    is_stepped: bool = False
    offloads: Callable[[str], bool] = lambda name: False

    def pipeline(self) -> Any:
        """Builds the manifest's img2img class from the bundle's components. Raises BundleError if one does not fit."""
        index = read_index(self.bundle)
        if (light := self._light(index)) is not None:
            return light
        kind = _placed(pipeline_class(self.manifest), self.device)
        wanted = inspect.signature(kind.__init__).parameters
        parts = {name: self._part(name, entry) for name, entry in index.items() if name in wanted}
        if "add_watermarker" in wanted:
            parts["add_watermarker"] = False
        missing = [name for name, item in wanted.items() if name != "self" and item.default is item.empty and name not in parts]
        try:
            return kind(**parts, **dict.fromkeys(missing)).to(self.device)
        except BundleError:
            raise
        except LOAD_ERRORS as error:
            raise BundleError(f"{self.bundle} does not load: {error}") from error

    def _light(self, index: Mapping[str, Any]) -> Any:
        """The pipeline without diffusers' class, if there is such a one and all models are graphs. Else None."""
        kind = self.light.get(self.manifest.pipeline_class)
        if kind is None or self.manifest.backend != "onnx":
            return None
        entries = {name: entry for name, entry in index.items() if name in kind.components_names and isinstance(entry, list)}
        present = [name for name in entries if (self.bundle / name).is_dir() or name == "vae"]
        tokenizers = {name: self._tokenizer(name, entries[name]) for name in present if name.startswith("tokenizer")}
        models = [name for name in present if name != "scheduler" and name not in tokenizers]
        required = {"vae", "unet", "scheduler", *(name.replace("tokenizer", "text_encoder") for name in tokenizers)}
        are_graphs = all(self._has_graph("vae_decoder" if name == "vae" else name) for name in models)
        if not (are_graphs and tokenizers and all(tokenizers.values()) and required <= set(present)):
            return None
        others = {name: self._part(name, entries[name], light=True) for name in present if name not in tokenizers}
        settings = {name: index[name] for name in kind.settings if name in index}
        return kind({**tokenizers, **others}, settings, self.device)

    def _tokenizer(self, name: str, entry: Any) -> LightCLIPTokenizer | None:
        return clip_tokenizer.read(self.bundle / name) if entry[1] in clip_tokenizer.CLASSES else None

    def _part(self, name: str, entry: Any, light: bool = False) -> Any:
        """One argument of the pipeline's class: a setting, an ONNX module, or an object that diffusers or transformers load."""
        if not isinstance(entry, list):
            return entry
        library, class_name = entry
        folder = self.bundle / name
        if class_name is None:
            return None
        if name == "vae" and self._has_graph("vae_decoder"):
            halves = self._graph("vae_encoder"), self._graph("vae_decoder")
            return OnnxVae(*halves, self.bundle / "vae_decoder", self.device, self.vae_memory)
        # ONNX bundles do not contain the safety checker, but model_index.json may name it.
        if not folder.is_dir():
            return None
        if self._has_graph(name):
            if library == "transformers" and name == "text_encoder" and self._has_graph(TOWER):
                return OnnxSeeingTextEncoder(self._graph(name), self._graph(TOWER), folder, self.device)
            if library == "transformers":
                return OnnxTextEncoder(self._graph(name), folder, self.device)
            return OnnxDenoiser(self._graph(name), folder, self.device, self._light_graph(name), self._control(name))
        return self._module(name, component_class(library, class_name), folder)

    def _module(self, name: str, kind: Any, folder: Path) -> Any:
        """An object that diffusers or transformers load; with its weights, if it is a module."""
        component = next((item for item in self.manifest.components if item.name == name), None)
        is_offloaded = self.device == "cuda" and self.offloads(name)
        stored = torch.float32
        if component is not None and (is_offloaded or not self.compiles):
            stored = _DTYPES.get(component.precision, torch.float32)
        loaded = _load(kind, folder, stored, component.weight_format if component is not None else "")
        if isinstance(loaded, torch.nn.Module):
            if self.is_stepped and isinstance(getattr(loaded, "lm_head", None), torch.nn.Linear):
                loaded.lm_head = _NoLogits()
            if is_offloaded:
                offload(loaded, self.device, in_fp32=True)
            else:
                compute_in_fp32(loaded)
        return loaded

    def _has_graph(self, name: str) -> bool:
        return (self.bundle / name / _GRAPH).is_file()

    def companion(self) -> Graph:
        """Opens the only graph of a companion. Raises BundleError."""
        return self._graph(self.manifest.family)

    def _control(self, name: str) -> LaterGraph | None:
        """A denoiser's control graph, None if it has none. If LoRAs are enabled, its rows may have LoRAs, too."""
        component = next((item for item in self.manifest.components if item.name == name), None)
        if component is None or component.control not in self.manifest.files:
            return None
        adapts = bool(self.lora_slots) and component.control_lora in self.manifest.files
        path, fused = component.control, component.fused_control
        if adapts:
            path, fused = component.control_lora, component.fused_control_lora
        chosen = fused if self._runs_fused(component) and fused in self.manifest.files else path

        def open_graph() -> Graph:
            runner = self.make(name + CONTROL_RUNNER, self.bundle / chosen)
            if not adapts:
                return Graph(runner, self.tensors)
            return AdaptedGraph(Unadapted(runner, self.tensors), runner, name, self.lora_slots, self.tensors)

        # On CUDA it has the weights of the plain graph (graph_weights.py).
        size = 0 if self.provider == "cuda" and self.tensors == "cuda" else component.bytes
        # Graphs on other providers differ in their last bits, so rows without its further inputs stay in the plain graph.
        return LaterGraph(open_graph, self.provider in ("cpu", "cuda"), size, component.image_prompts)

    def _graph(self, name: str) -> Graph:
        """Opens a component's graph: the one with fused operators, if the provider has them and it opens, else the plain one."""
        component = next((item for item in self.manifest.components if item.name == name), None)
        if component is not None and component.fused and self._runs_fused(component):
            if component.fused not in self.manifest.files:
                raise BundleError(f"{self.bundle}: the manifest names a fused graph that is not in the bundle: {component.fused}")
            try:
                return self._adapted(component, component.fused, component.fused_lora)
            except BundleError as error:
                _log.warning("%s; the plain graph is used instead", error)
        try:
            return self._adapted(component, f"{name}/{_GRAPH}", "" if component is None else component.lora)
        except BundleError as error:
            if component is not None and component.precision == "bf16":
                if self.provider in ("cpu", "openvino"):
                    raise BundleError(f"{self.bundle / name} is bf16, and bf16 graphs need a GPU: {error}") from error
                if self.offloads(name):
                    how = "export it with --precision fp16 or --backend hybrid, or serve it without --offload"
                    raise BundleError(f"{self.bundle / name} is bf16, and offloaded graphs run on the CPU: {how}") from error
            raise

    def _runs_fused(self, component: Component) -> bool:
        """Whether the provider has the operators of the component's fused graphs: CUDA all, the CPU provider attention in fp32,
        which then keeps no scores (gigabytes for thousands of tokens)."""
        if self.provider == "cpu":
            return component.precision == "fp32" and component.fused.endswith(FUSED_ATTENTION)
        return self.provider == "cuda"

    def _light_graph(self, name: str) -> Graph | None:
        """Opens the light graph of a denoiser: the fused one, if the provider runs it. None if none opens."""
        component = next((item for item in self.manifest.components if item.name == name), None)
        if component is None:
            return None
        fused = component.fused_light if component.fused and self._runs_fused(component) else ""
        for path in (fused, component.light):
            if path and (self.bundle / path).is_file():
                try:
                    return Graph(self.make(name + LIGHT_RUNNER, self.bundle / path), self.tensors)
                except BundleError as error:
                    _log.warning("%s; it does not serve for speedups", error)
        return None

    def _adapted(self, component: Component | None, path: str, lora: str) -> Graph:
        """Opens the graph `path` of the bundle, with its LoRA graph if LoRAs are enabled and there is one that opens."""
        name = path.partition("/")[0]
        runner = self.make(name, self.bundle / path)
        tensors = "cpu" if self.offloads(name) else self.tensors
        if component is not None and self.lora_slots and lora in self.manifest.files:
            # Graphs on other providers differ in their last bits, so rows without LoRAs stay in the plain graph.
            mixes = self.provider in ("cpu", "cuda")
            try:
                adapted = self.make(name + LORA_RUNNER, self.bundle / lora)
            except BundleError as error:
                _log.warning("%s; requests cannot have LoRAs that adapt the %s", error, name)
            else:
                return AdaptedGraph(runner, adapted, name, self.lora_slots, tensors, mixes)
        return Graph(runner, tensors)


def _quantized(folder: Path, weight_format: WeightFormat) -> Any:
    """transformers' configuration of the layers of a module that are in `weight_format`. Raises BundleError."""
    from img2img_server.runtime.common.weight_only import BITS, WeightOnlyConfig

    try:
        return WeightOnlyConfig.read(folder, BITS[weight_format])
    except (ValueError, KeyError, SafetensorError) as error:
        raise BundleError(f"{folder} does not load: {error}") from error


class _NoLogits(torch.nn.Module):
    """Replaces a language model's last layer."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Empty logits [B, T, 0] for states [B, T, D]."""
        return states[..., :0]


def read_index(bundle: Path) -> dict[str, Any]:
    """The content of the bundle's model_index.json. Raises BundleError."""
    return read_object(bundle / "model_index.json")


def pipeline_class(manifest: Manifest) -> Any:
    """The manifest's diffusers class. Raises BundleError if the installed diffusers does not have it."""
    found = getattr(diffusers, manifest.pipeline_class, None)
    if not (inspect.isclass(found) and issubclass(found, diffusers.DiffusionPipeline)):
        raise BundleError(f"the bundle needs '{manifest.pipeline_class}', which diffusers {diffusers.__version__} lacks")
    return found


def _placed(kind: Any, device: str) -> Any:
    """A subclass of `kind` whose pipelines report `device`: diffusers reports their first module's, which may differ."""
    if device == "cpu":
        return kind
    where = property(lambda pipe: torch.device(device))
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "device": where, "_execution_device": where})


def component_class(library: str, class_name: str) -> Any:
    """A class of transformers, diffusers, or a package of diffusers' pipelines. No other code is imported."""
    found = getattr(importlib.import_module(library), class_name, None) if library in _LIBRARIES else None
    if found is None and library.isidentifier() and (Path(diffusers.__file__).parent / "pipelines" / library).is_dir():
        try:
            found = getattr(importlib.import_module(f"diffusers.pipelines.{library}"), class_name, None)
        except ImportError as error:
            raise BundleError(f"{library}.{class_name} cannot be imported: {error}") from error
    if found is None:
        raise BundleError(f"the bundle names {library}.{class_name}: only classes of diffusers and transformers are loaded")
    return found


def _load(kind: Any, folder: Path, dtype: torch.dtype, weight_format: WeightFormat) -> Any:
    """Loads an object of a diffusers or transformers class from a folder; models from safetensors, with weights in `dtype`, of
    which layers may be stored in `weight_format`."""
    try:
        kind = loadable(kind)
    except ImportError as error:
        raise BundleError(f"{folder} does not load: {error}") from error
    settings: dict[str, Any] = {"local_files_only": True}
    if inspect.isclass(kind) and issubclass(kind, torch.nn.Module):
        settings |= {"torch_dtype": dtype, "use_safetensors": True}
        if weight_format:
            settings["quantization_config"] = _quantized(folder, weight_format)
    elif kind.__module__.startswith("transformers."):
        # If unset, transformers asks at the terminal whether to run code from the bundle or a repository that it names.
        settings["trust_remote_code"] = False
    try:
        if inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin):
            return registry.read(kind, folder)
        with within(folder.glob("*.safetensors")):
            return kind.from_pretrained(folder, **settings)
    except LOAD_ERRORS as error:
        raise BundleError(f"{folder} does not load: {error}") from error

"""Loads a checkpoint with diffusers, and plans its bundle: graphs, a graph inside PyTorch (hybrid), or PyTorch only."""

import importlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
from diffusers import AutoPipelineForImage2Image
from diffusers.pipelines.auto_pipeline import AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, _get_task_class
from img2img_server.runtime.common.processors import processors
from img2img_server.runtime.common.weight_budget import within
from img2img_server.runtime.onnx.components import LOAD_ERRORS
from safetensors import safe_open

from img2img_export.convert.graphs import quiet
from img2img_export.errors import ExportError, first_line
from img2img_export.options import Backend
from img2img_export.read.checkpoint import DENOISERS, INDEX_NAME, Layout, read_index
from img2img_export.read.identify import FLUX_FILL, INPAINTING
from img2img_export.read.unused import refuse_unused

WHOLE = "whole"
"""The family of opaque pipelines: the engine does not step them, each call runs from start to end."""

_CLIP = ("text_encoder", "unet", "vae")
GRAPHS = {
    "StableDiffusionImg2ImgPipeline": ("stable-diffusion", _CLIP),
    "StableDiffusionXLImg2ImgPipeline": ("stable-diffusion-xl", ("text_encoder", "text_encoder_2", "unet", "vae")),
    "LatentConsistencyModelImg2ImgPipeline": ("latent-consistency", _CLIP),
    "StableDiffusionInpaintPipeline": ("stable-diffusion-inpainting", _CLIP),
    "StableDiffusionXLInpaintPipeline": ("stable-diffusion-xl-inpainting", ("text_encoder", "text_encoder_2", "unet", "vae")),
    "StableDiffusionInstructPix2PixPipeline": (WHOLE, _CLIP),
    "StableDiffusion3Img2ImgPipeline": (
        "stable-diffusion-3",
        ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"),
    ),
    "FluxImg2ImgPipeline": ("flux", ("text_encoder", "text_encoder_2", "transformer", "vae")),
    "FluxControlImg2ImgPipeline": ("flux-control", ("text_encoder", "text_encoder_2", "transformer", "vae")),
    FLUX_FILL: ("flux-fill", ("text_encoder", "text_encoder_2", "transformer", "vae")),
    "ChromaImg2ImgPipeline": ("chroma", ("text_encoder", "transformer", "vae")),
    "FluxKontextPipeline": ("flux-kontext", ("text_encoder", "text_encoder_2", "transformer", "vae")),
    "Flux2KleinPipeline": ("flux-2-klein", ("text_encoder", "transformer", "vae")),
    "Flux2Pipeline": ("flux-2", ("text_encoder", "transformer", "vae")),
    "QwenImageImg2ImgPipeline": ("qwen-image", ("text_encoder", "transformer", "vae")),
    "QwenImageEditPipeline": ("qwen-image-edit", ("text_encoder", "transformer", "vae")),
    "QwenImageEditPlusPipeline": ("qwen-image-edit-plus", ("text_encoder", "transformer", "vae")),
    "ZImageImg2ImgPipeline": ("z-image", ("text_encoder", "transformer", "vae")),
    "LongCatImageEditPipeline": ("longcat-image-edit", ()),
}
"""Pipeline classes with a family in the server, or that become graphs entirely: the family's name, and the components; none if
only the denoiser becomes a graph."""

_STEPPED_AS_GRAPH = (
    "LongCatImageEditPipeline",
    "ChromaImg2ImgPipeline",
    "FluxKontextPipeline",
    "Flux2KleinPipeline",
    "Flux2Pipeline",
    "QwenImageImg2ImgPipeline",
    "QwenImageEditPipeline",
    "QwenImageEditPlusPipeline",
    "ZImageImg2ImgPipeline",
)
"""Pipeline classes that the engine steps only if their transformer is a graph of tokens (token_graphs.py)."""

_TOKENS = (
    *_STEPPED_AS_GRAPH,
    "StableDiffusion3Img2ImgPipeline",
    "FluxImg2ImgPipeline",
    "FluxControlImg2ImgPipeline",
    FLUX_FILL,
)
"""All pipeline classes whose transformer becomes a graph of tokens."""

_OWN_CLASS = {
    **{name: name for name in (*INPAINTING, FLUX_FILL)},
    "StableDiffusionInstructPix2PixPipeline": "StableDiffusionInstructPix2PixPipeline",
    "ChromaPipeline": "ChromaImg2ImgPipeline",
    "ChromaImg2ImgPipeline": "ChromaImg2ImgPipeline",
    "SanaSprintPipeline": "SanaSprintImg2ImgPipeline",
    "SanaSprintImg2ImgPipeline": "SanaSprintImg2ImgPipeline",
    "LongCatImageEditPipeline": "LongCatImageEditPipeline",
    "QwenImage21Pipeline": "QwenImage21Pipeline",
    "StableDiffusionXLControlNetPAGPipeline": "StableDiffusionXLControlNetPAGImg2ImgPipeline",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": "StableDiffusionXLControlNetPAGImg2ImgPipeline",
}
"""Classes that AutoPipelineForImage2Image's mapping lacks, or does not find beside a ControlNet, and those of them that turn
images into images."""

_UNKNOWN_INPUTS = {
    "control_image": "a control image",
    "mask_image": "a mask",
    "depth_map": "a depth map",
}
"""Parameters of a pipeline's call without a field in requests, and their meaning."""

CONTROLLED: Mapping[str, str] = {
    "StableDiffusionControlNetImg2ImgPipeline": "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline": "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": "StableDiffusionXLImg2ImgPipeline",
    "FluxControlNetImg2ImgPipeline": "FluxImg2ImgPipeline",
}
"""Classes of models with a ControlNet, which requests name, and of the models without it."""

_OWN_CONTROL = frozenset({"FluxControlImg2ImgPipeline", "StableDiffusionXLControlNetPAGImg2ImgPipeline"})
"""Classes of models with a built-in control input."""

_PERTURBED = "PAG"
"""In the names of the classes that guide by perturbed attention."""

_BINNED = frozenset({"SanaSprintImg2ImgPipeline"})
"""Classes that make images at fixed sizes by aspect, so that the square images of an export show one size only."""

_PRIOR_HINT = "its prior is missing: load the combined pipeline, save it with save_pretrained() and export that directory: "
_SHOWN = 4
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


_LAYERS_READ, _LAST_STATES = "text_encoder_out_layers", {"ZImageImg2ImgPipeline": -2}
"""The parameter of FLUX.2's classes with the hidden states that they read, and the last one that others read, if not the last."""
_IMAGES = frozenset({"image", "prompt_image"})
"""The parameters of `encode_prompt` for images."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How to export a pipeline. `graphs` are the components that become graphs; `reason` says why not all do.

    `last_state` is the last hidden state that the pipeline reads of a language model, -1 for the last that there is; with
    `sees_images` it gives the language model images, too.
    """

    pipeline_class: str
    family: str
    backend: Literal["onnx", "hybrid", "torch"]
    graphs: tuple[str, ...] = ()
    reason: str | None = None
    last_state: int = -1
    sees_images: bool = False

    @property
    def tokens(self) -> tuple[str, ...]:
        """The components that become graphs of tokens."""
        return tuple(name for name in self.graphs if name in DENOISERS and self.pipeline_class in _TOKENS)


def plan(layout: Layout, backend: Backend) -> Plan:
    """The first plan for the pipeline's class. Raises ExportError if `backend` is not possible."""
    return next(plans_for(layout, backend))


def plans_for(layout: Layout, backend: Backend) -> Iterator[Plan]:
    """The plans in order of preference: graphs of everything, of the denoiser only, PyTorch. A given backend has one plan."""
    name = _image_class(layout.pipeline_class)
    _refuse_unservable(name)
    family, components = GRAPHS.get(name, (WHOLE, ()))
    present = tuple(component for component in components if component in layout.components)
    denoiser = tuple(component for component in DENOISERS if component in layout.components)
    reason = None if present else f"img2img cannot export all parts of {name} as graphs"
    if (why := _why_no_graph(name)) is not None:
        denoiser, reason = (), why
    if backend == "onnx" and not present:
        supported = (known for known, (_, parts) in GRAPHS.items() if parts)
        raise ExportError(f"{reason}: --backend onnx supports {', '.join(supported)}")
    if backend == "hybrid" and not denoiser:
        parts = ", ".join(DENOISERS)
        raise ExportError(
            f"{why or f'{name} has none of the components {parts}, which --backend hybrid requires'}: use --backend torch"
        )
    if backend in ("auto", "onnx") and present:
        yield Plan(name, family, "onnx", present, None, *_reading(name))
    if backend in ("auto", "hybrid") and denoiser:
        yield Plan(name, family, "hybrid", denoiser, "requested with --backend hybrid" if backend == "hybrid" else reason)
    if backend in ("auto", "torch"):
        whole = WHOLE if name in _STEPPED_AS_GRAPH else family
        yield Plan(name, whole, "torch", (), "requested with --backend torch" if backend == "torch" else reason)


def _reading(name: str) -> tuple[int, bool]:
    """The last hidden state that a pipeline class reads of a language model by default, and whether it gives it images."""
    kind = getattr(diffusers, name, None)
    if kind is None:
        return -1, False
    layers = inspect.signature(kind.__call__).parameters.get(_LAYERS_READ)
    encode = getattr(kind, "encode_prompt", None)
    sees = encode is not None and not _IMAGES.isdisjoint(inspect.signature(encode).parameters)
    return (_LAST_STATES.get(name, -1) if layers is None else max(layers.default)), sees


def _image_class(name: str) -> str:
    """The image-to-image class for a pipeline class; the same class if diffusers has none (loading then fails)."""
    if name in _OWN_CLASS:
        return _OWN_CLASS[name]
    found = _get_task_class(AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, name, throw_error_if_not_exist=False)
    return name if found is None else str(found.__name__)


def _why_no_graph(name: str) -> str | None:
    """Why the denoiser of a class cannot be a graph, None if it may be tried."""
    if _PERTURBED in name:
        return f"{name} exchanges the attention layers of its denoiser during a call, and a graph's layers are fixed"
    if name in _BINNED:
        return f"{name} makes images at fixed sizes by their aspect, and an export would fix one of them in the graph"
    return None


def _refuse_unservable(name: str) -> None:
    """Raises ExportError for an image-to-image class of diffusers that needs more than a text and an image, or makes more than an
    image."""
    kind = getattr(diffusers, name, None)
    parameters = inspect.signature(kind.__call__).parameters if kind is not None else {}
    for parameter, what in _UNKNOWN_INPUTS.items():
        if parameter in parameters and name not in (*INPAINTING, FLUX_FILL, *_OWN_CONTROL):
            if name in CONTROLLED:
                raise ExportError(
                    f"this pipeline ({name}) is a model with a ControlNet, which becomes a bundle of its own: export the plain "
                    f"model{_how(name)} and the ControlNet's directory, and name the ControlNet in requests (controls)"
                )
            raise ExportError(
                f"this pipeline ({name}) needs {what} ({parameter}), which img2img does not support for this class: "
                "export the plain model that it was made from"
            )
    if "layers" in parameters:
        raise ExportError(
            f"this pipeline ({name}) divides an image into layers, and img2img serves pipelines that make one image of it"
        )


def _how(name: str) -> str:
    """The flag that a plain model needs to take ControlNets, with a comma, or ""."""
    return ", with --control-graphs," if name.startswith("Flux") else ""


@dataclass(frozen=True, slots=True)
class Loader:
    """Loads the checkpoint in `directory`: safetensors only, local files only.

    Weights keep their stored type and are mapped: they are in memory only once used.
    """

    directory: Path
    layout: Layout
    variant: str | None = None

    def pipeline(self, dtype: torch.dtype | None = None) -> Any:
        """The image-to-image pipeline on the CPU, its weights in `dtype` (None: as stored).

        Raises ExportError if diffusers cannot load it.
        """
        parts: dict[str, Any] = dict.fromkeys((*self.layout.left_out, *_absent(self.directory)))
        if "safety_checker" in parts:
            parts["requires_safety_checker"] = False
        types = {name: self.stored_dtype(name) for name in self.layout.components}
        kind: Any = AutoPipelineForImage2Image
        if self.layout.pipeline_class in _OWN_CLASS:
            kind = getattr(diffusers, _OWN_CLASS[self.layout.pipeline_class])
        weighted = {name: self.component(name, dtype) for name in self.layout.components if self._has_weights(name)}
        weighted |= self._processors()
        try:
            with quiet(), within(self.directory.rglob("*.safetensors")):
                pipeline = kind.from_pretrained(
                    str(self.directory),
                    use_safetensors=True,
                    local_files_only=True,
                    torch_dtype={**types, "default": torch.float32} if dtype is None else dtype,
                    variant=self.variant,
                    **parts,
                    **weighted,
                )
        except LOAD_ERRORS as error:
            hint = _PRIOR_HINT if "'prior_prior'" in str(error) else ""
            raise ExportError(f"diffusers cannot load the model: {hint}{type(error).__name__}: {first_line(error)}") from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def component(self, name: str, dtype: torch.dtype | None = None) -> Any:
        """One component, its weights in `dtype` (None: as stored).

        Raises ExportError if it does not load, or if weights are missing or unexpected (diffusers and transformers only warn).
        """
        folder = self.directory / name
        has_variant = self.variant is not None and any(folder.glob(f"*.{self.variant}*.safetensors"))
        try:
            with quiet(), within(folder.glob("*.safetensors")):
                loaded, found = self._class_of(name).from_pretrained(
                    str(folder),
                    use_safetensors=True,
                    local_files_only=True,
                    torch_dtype=self.stored_dtype(name) if dtype is None else dtype,
                    variant=self.variant if has_variant else None,
                    output_loading_info=True,
                )
        except LOAD_ERRORS as error:
            raise ExportError(f"{name} does not load: {type(error).__name__}: {first_line(error)}") from error
        if missing := sorted(found["missing_keys"]):
            shown = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
            raise ExportError(f"{name} is incomplete: weights that its config.json requires are missing ({shown})")
        refuse_unused(name, found["unexpected_keys"], advice=", or its config.json belongs to another model")
        return loaded.eval()

    def _class_of(self, name: str) -> Any:
        """A component's class. As in model_index.json, its library may be one of diffusers' pipeline packages."""
        library, kind = self.layout.components[name]
        module = {"diffusers": diffusers, "transformers": transformers}.get(library)
        if module is None:
            module = importlib.import_module(f"diffusers.pipelines.{library}")
        try:
            return getattr(module, kind)
        except AttributeError:
            raise ExportError(f"{INDEX_NAME} names {library}.{kind}, which the installed version does not provide") from None

    def _processors(self) -> dict[str, Any]:
        """The components that diffusers could not load, by name: processors that need an absent package for videos.

        Raises ExportError if they cannot be loaded without it.
        """
        try:
            return processors(self.directory, {name: self._class_of(name) for name in self.layout.components})
        except LOAD_ERRORS as error:
            raise ExportError(f"a processor does not load: {first_line(error)}") from error

    def _has_weights(self, name: str) -> bool:
        kind = self._class_of(name)
        return isinstance(kind, type) and issubclass(kind, torch.nn.Module)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The most frequent type of a component's weights; fp32 unless that is fp16 or bf16."""
        files = sorted((self.directory / name).glob("*.safetensors"))
        chosen = [path for path in files if self.variant and f".{self.variant}" in path.name] or files
        counts: dict[str, int] = {}
        for path in chosen:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    kind = file.get_slice(key).get_dtype()
                    counts[kind] = counts.get(kind, 0) + 1
        return _DTYPES.get(max(counts, key=lambda kind: counts[kind], default=""), torch.float32)


def _absent(directory: Path) -> list[str]:
    """Components that the checkpoint declares absent, such as the T5 of SD3. Some classes require all of them as arguments."""
    index = read_index(directory / INDEX_NAME)
    return [name for name, value in index.items() if value == [None, None]]


def modules(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The components of a pipeline that have weights, by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}

"""The parts of a model that become graphs: how each is called, and the names of its graph's inputs and outputs.

`graph_kinds` describes the known classes. Any other module (the denoisers of hybrid bundles) is described by recorded calls. A
UNet is traced at an odd size: at an even size, tracing freezes the branch of diffusers that passes sizes to the upsamplers, and
the graph then refuses most sizes.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderTiny
from img2img_server.runtime.common.vae import tensor_of

from img2img_export.convert.frame_vae import FrameVae
from img2img_export.convert.graph_kinds import (
    KINDS,
    Axes,
    Called,
    GraphKind,
    LanguageModel,
    VaeDecoder,
    VaeEncoder,
)
from img2img_export.errors import ExportError
from img2img_export.read.checkpoint import LANGUAGE_MODELS

Tensors = dict[str, torch.Tensor]
"""Inputs or outputs of a graph, by name, in its order."""


@dataclass(frozen=True, slots=True)
class Part:
    """A graph to make from the pipeline's component `component`; `name` is the graph's folder.

    `call` runs the module on the graph's inputs and returns the graph's outputs, both by name. The module is traced within
    `kind.patched()`.
    """

    name: str
    component: str
    inputs: Axes
    outputs: Axes
    call: Callable[[Any, Tensors], Tensors]
    kind: GraphKind


def text_part(name: str, module: Any, hidden_states: bool, masked: bool = False, read: Sequence[int] = ()) -> Part:
    """A text encoder (CLIP, T5): from token ids [B, T] to its outputs and, if `hidden_states`, every hidden state. Of a language
    model the outputs are the hidden states `read`.

    If `masked`, it also takes an attention mask [B, T].
    """
    kind = _text_kind(name, module, hidden_states, read)
    is_language_model = isinstance(kind, LanguageModel)
    settings = {"use_cache": False} if is_language_model else {}

    def call(encoder: Any, inputs: Tensors) -> Tensors:
        reader = encoder.base_model if is_language_model else encoder  # without logits, which nothing reads
        output = reader(**inputs, **settings, output_hidden_states=hidden_states, return_dict=True)
        found = {key: value for key, value in output.items() if isinstance(value, torch.Tensor)}
        states = enumerate(output.hidden_states) if hidden_states else ()
        return _ordered({**found, **{f"hidden_states.{index}": state for index, state in states}}, kind.outputs)

    inputs = kind.inputs
    if masked:
        inputs = {**inputs, "attention_mask": inputs["input_ids"]}
    return Part(name, name, inputs, kind.outputs, call, kind)


def _text_kind(name: str, module: Any, hidden_states: bool, read: Sequence[int]) -> GraphKind:
    """Raises ExportError if there is none."""
    found = type(module).__name__
    if found in LANGUAGE_MODELS and not read:
        raise ExportError(f"{name} is a {found}, of which img2img exports hidden states, and the pipeline reads none")
    if found in LANGUAGE_MODELS:
        return LanguageModel(module.config, read)
    if found not in KINDS:
        raise ExportError(f"{name} is a {found}; img2img makes graphs of {', '.join((*KINDS, *LANGUAGE_MODELS))}")
    module.config.output_hidden_states = hidden_states
    return KINDS[found](module.config)


def vae_parts(module: Any) -> tuple[Part, Part]:
    """The two graphs of a VAE. Encoder: pixels [B, 3, H, W] to the parameters of a latent distribution [B, 2C, h, w] (for an
    AutoencoderTiny to latents [B, C, h, w]). Decoder: latents to pixels."""

    def encode(vae: Any, inputs: Tensors) -> Tensors:
        return {"latent_parameters": _image(tensor_of(vae.encode(_seen(vae, inputs["sample"]))))}

    def decode(vae: Any, inputs: Tensors) -> Tensors:
        return {"sample": _image(vae.decode(_seen(vae, inputs["latent_sample"])).sample)}

    encoder: GraphKind
    decoder: GraphKind
    if isinstance(module, AutoencoderTiny | AutoencoderKLQwenImage):
        # Unlike an AutoencoderKL, they have no block types in their configuration.
        pixels, latents = ({0: "batch_size", 2: f"{what}height", 3: f"{what}width"} for what in ("", "latent_"))
        encoder = Called(module.config, {"sample": pixels}, {"latent_parameters": latents})
        decoder = Called(module.config, {"latent_sample": latents}, {"sample": pixels})
    else:
        encoder, decoder = VaeEncoder(module.config), VaeDecoder(module.config)
    return (
        Part("vae_encoder", "vae", encoder.inputs, encoder.outputs, encode, encoder),
        Part("vae_decoder", "vae", decoder.inputs, decoder.outputs, decode, decoder),
    )


def traced(module: Any) -> Any:
    """The module to trace for the graphs of `module`: itself, or one for single images that shares its weights."""
    return FrameVae(module) if isinstance(module, AutoencoderKLQwenImage) else module


def _seen(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """Images as `vae` takes them: of a video's VAE, [B, C, 1, H, W]."""
    return images[:, :, None] if isinstance(vae, AutoencoderKLQwenImage) else images


def _image(tensor: torch.Tensor) -> torch.Tensor:
    """The only frame of a video, [B, C, H, W]."""
    return tensor[:, :, 0] if tensor.ndim == 5 else tensor


def denoiser_part(name: str, module: Any, calls: list[Tensors], structure: Mapping[str, Any]) -> Part:
    """A UNet or transformer: from noised latents and timesteps [B] to the prediction.

    `calls` are recorded inputs of several sizes; `structure` is one of these calls before it was flattened.
    """
    inputs = _varying(calls)
    known = KINDS.get(type(module).__name__)
    if known is not None:
        kind = known(module.config)
        inputs = {key: {**axes, **kind.inputs.get(key, {})} for key, axes in inputs.items()}
    else:
        output = "out_sample" if name == "unet" else "out_hidden_states"
        varying = {0: "batch_size", 2: "height", 3: "width"} if name == "unet" else {0: "batch_size", 1: "sequence_length"}
        kind = Called(module.config, inputs, {output: varying})
    (output,) = kind.outputs

    def call(denoiser: Any, tensors: Tensors) -> Tensors:
        given = denoiser(**restore(tensors, structure), return_dict=False)
        return {output: given[0]}

    return Part(name, name, inputs, kind.outputs, call, kind)


def flatten(call: Mapping[str, Any]) -> Tensors:
    """The tensors among a call's arguments by name; tensors in a dictionary by their keys."""
    found: Tensors = {}
    for name, value in call.items():
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, Mapping):
            found.update(flatten(value))
    return found


def restore(tensors: Tensors, structure: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`: arguments like `structure` with the given tensors."""
    return {name: _restored(name, value, tensors) for name, value in structure.items()}


def _restored(name: str, value: Any, tensors: Tensors) -> Any:
    if isinstance(value, Mapping):
        return restore(tensors, value)
    return tensors[name] if isinstance(value, torch.Tensor) else value


def bind(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, without `return_dict`."""
    bound = inspect.signature(function).bind(*args, **kwargs).arguments
    extra = bound.pop("kwargs", {})
    return {name: value for name, value in {**bound, **extra}.items() if name != "return_dict"}


def _varying(calls: list[Tensors]) -> Axes:
    """The axes that differ between calls, and the first axis of every tensor with one row per sample."""
    first = calls[0]
    rows = len(next(iter(first.values())))
    axes: Axes = {}
    for name, value in first.items():
        varies = {
            axis: f"{name}_{axis}" for axis in range(value.ndim) if any(c[name].shape[axis] != value.shape[axis] for c in calls)
        }
        if value.ndim and len(value) == rows:
            varies[0] = "timestep_batch" if name == "timestep" else "batch_size"
        axes[name] = varies
    return axes


def _ordered(found: Tensors, names: Axes) -> Tensors:
    return {name: found[name] for name in names}

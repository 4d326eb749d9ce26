"""The kinds of modules that become graphs: each graph's inputs and outputs, and the patches for tracing.

Tensors and axes have the names of optimum-onnx, so its pipelines (`ORTPipelineForImage2Image`) load the bundles. One difference:
a UNet's `timestep` has one value per sample, so requests at different steps share a call.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from diffusers.models.transformers import transformer_chroma, transformer_flux, transformer_flux2
from img2img_server.bundle.image_encoders import EMBEDS, PIXELS, STATES
from optimum.exporters.base import ExporterConfig
from optimum.utils import NormalizedConfig
from transformers import masking_utils

from img2img_export.errors import ExportError

Axes = dict[str, dict[int, str]]
"""The variable axes, by the tensor's name and the axis index."""

_TEXT = {0: "batch_size", 1: "sequence_length"}
_IMAGE = {0: "batch_size", 2: "height", 3: "width"}
MASKED = 3e4
"""Subtracted from the scores of masked tokens; half precision can represent it."""


def _normalize(input: torch.Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> torch.Tensor:
    """torch.rms_norm in operators of opset 18. As in torch, half precision is squared and summed in fp32."""
    axes = tuple(range(-len(normalized_shape), 0))
    epsilon = torch.finfo(input.dtype).eps if eps is None else eps
    wide = input.float()
    normalized = (wide / torch.sqrt(torch.mean(torch.square(wide), dim=axes, keepdim=True) + epsilon)).to(input.dtype)
    return normalized if weight is None else normalized * weight


_attend_in_torch = torch.nn.functional.scaled_dot_product_attention


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **settings: Any,
) -> torch.Tensor:
    """torch's attention with any mask converted to the query's type: torch exports other masks in fp32 always.

    The scale is a constant, since the head size is known: torch would export its computation from the query's shape, which runs
    on the CPU (tracing.py).
    """
    if scale is None:
        scale = 1 / math.sqrt(int(query.shape[-1]))
    if is_causal:
        attn_mask = torch.arange(query.shape[-2])[:, None] >= torch.arange(key.shape[-2])
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return _attend_in_torch(query, key, value, attn_mask, dropout_p, scale=scale, **settings)
    bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    states = _attend_in_torch(query, key, value, bias, dropout_p, scale=scale, **settings)
    # Of queries that may attend to nothing, as padding before a text, torch's result is 0, and that of a softmax NaN.
    return states if is_causal else states.masked_fill(bias.amax(-1, keepdim=True) == -torch.inf, 0)


def _rotate(x: torch.Tensor, freqs_cis: Any, use_real: bool = True, use_real_unbind_dim: int = -1, sequence_dim: int = 2) -> Any:
    """diffusers' `apply_rotary_emb` for Flux, without `reshape(*x.shape[:-1], -1, 2)`, which freezes the shape in a trace."""
    if not use_real or use_real_unbind_dim != -1:
        raise ExportError(
            "the rotary embedding of Flux in this diffusers release cannot be traced: install the release that img2img supports"
        )
    cos, sin = (part[None, None] if sequence_dim == 2 else part[None, :, None] for part in freqs_cis)
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def _padding(padding_mask: torch.Tensor) -> Callable[..., torch.Tensor]:
    """transformers' function for masks [B, T] of padded texts, without indices, which CUDA graphs cannot record."""
    return lambda *_: padding_mask[:, None, None]


def _embed_time(self: Any, timestep: torch.Tensor) -> torch.Tensor:
    """Chroma's embedding of timesteps [B] and the indices of its modulations. There, `[0] * batch_size` freezes the batch."""
    embedded = torch.cat([self.time_proj(timestep), self.guidance_proj(torch.zeros_like(timestep))], dim=1)
    embedded = embedded.to(timestep.dtype).unsqueeze(1).repeat(1, self.mod_proj.shape[0], 1)
    modulations = self.mod_proj.to(timestep.dtype).repeat(timestep.shape[0], 1, 1)
    return torch.cat([embedded, modulations], dim=-1)


class GraphKind(ExporterConfig):  # type: ignore[misc]
    """The kind of graph for a module with the configuration `config`."""

    NORMALIZED_CONFIG_CLASS = NormalizedConfig.with_args(allow_new=True)
    EXACT: tuple[str, ...] = ("timestep",)
    """Inputs that stay in fp32 in every precision: half precision cannot represent most timesteps of a scheduler."""
    PATCHES: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (torch, "rms_norm", _normalize),
        (torch.nn.functional, "scaled_dot_product_attention", _attend),
        *((module, "apply_rotary_emb", _rotate) for module in (transformer_flux, transformer_flux2)),
        (transformer_chroma.ChromaCombinedTimestepTextProjEmbeddings, "forward", _embed_time),
        (masking_utils, "padding_mask_function", _padding),
    )
    """Functions that cannot be traced: their module, their name, and a traceable replacement."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, task="feature-extraction")

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Replaces the untraceable functions within the block; results stay the same."""
        with contextlib.ExitStack() as stack:
            for owner, name, traceable in self.PATCHES:
                stack.enter_context(patch.object(owner, name, traceable))
            yield


class CLIPText(GraphKind):
    """CLIP's text model. If its configuration has `output_hidden_states`, every hidden state is an output."""

    POOLED: Axes = {"last_hidden_state": _TEXT, "pooler_output": {0: "batch_size"}}

    @property
    def inputs(self) -> Axes:
        """Token ids [B, T]."""
        return {"input_ids": _TEXT}

    @property
    def outputs(self) -> Axes:
        """The last hidden state [B, T, D], a pooled vector [B, D] or [B, P], then the hidden states by layer."""
        count = self._config.num_hidden_layers + 1 if self._config.output_hidden_states else 0
        return {**self.POOLED, **{f"hidden_states.{index}": _TEXT for index in range(count)}}


class CLIPTextWithProjection(CLIPText):
    """CLIP's text model with the projection of its pooled vector."""

    POOLED: Axes = {"text_embeds": {0: "batch_size"}, "last_hidden_state": _TEXT}


class CLIPVision(GraphKind):
    """CLIP's image encoder with the projection of its pooled vector."""

    @property
    def inputs(self) -> Axes:
        """Normalized pixels [B, 3, S, S] of the one size that it has positions for."""
        return {PIXELS: {0: "batch_size"}}

    @property
    def outputs(self) -> Axes:
        """The projected vector [B, P], and the hidden states [B, T, D] before the last layer."""
        return {EMBEDS: {0: "batch_size"}, STATES: {0: "batch_size"}}


class T5Encoder(GraphKind):
    """T5's encoder. Flux and SD3 pass it no attention mask."""

    @property
    def inputs(self) -> Axes:
        """Token ids [B, T]."""
        return {"input_ids": _TEXT}

    @property
    def outputs(self) -> Axes:
        """The last hidden state [B, T, D]."""
        return {"last_hidden_state": _TEXT}


class LanguageModel(GraphKind):
    """A language model that reads a text. The graph has the hidden states that a pipeline reads, and no layers after them."""

    def __init__(self, config: Any, states: Sequence[int]) -> None:
        super().__init__(config)
        self._states = states

    @property
    def inputs(self) -> Axes:
        """Token ids [B, T]."""
        return {"input_ids": _TEXT}

    @property
    def outputs(self) -> Axes:
        """Hidden states [B, T, D] by their index in transformers' tuple."""
        return {f"hidden_states.{index}": _TEXT for index in self._states}


class UNet(GraphKind):
    """The UNet of Stable Diffusion 1, 2 and XL, LCM and InstructPix2Pix."""

    @property
    def inputs(self) -> Axes:
        """Latents [B, C, h, w], timesteps [B], text [B, T, D]; also SDXL's and LCM's embeddings, if it has layers for them."""
        names: Axes = {"sample": _IMAGE, "timestep": {0: "timestep_batch"}, "encoder_hidden_states": _TEXT}
        if self._config.addition_embed_type == "text_time":
            names |= {"text_embeds": {0: "batch_size"}, "time_ids": {0: "batch_size"}}
        if self._config.time_cond_proj_dim is not None:
            names["timestep_cond"] = {0: "batch_size"}
        return names

    @property
    def outputs(self) -> Axes:
        """The prediction, in the shape of the latents."""
        return {"out_sample": _IMAGE}


class VaeEncoder(GraphKind):
    """The encoder of an AutoencoderKL."""

    @property
    def inputs(self) -> Axes:
        """Pixels [B, 3, H, W]."""
        return {"sample": {0: "batch_size", 2: "sample_height", 3: "sample_width"}}

    @property
    def outputs(self) -> Axes:
        """The parameters of the latents' distribution [B, 2C, h, w]."""
        scale = 2 ** (len(self._config.down_block_types) - 1)
        return {"latent_parameters": {0: "batch_size", 2: f"sample_height / {scale}", 3: f"sample_width / {scale}"}}


class VaeDecoder(GraphKind):
    """The decoder of an AutoencoderKL."""

    @property
    def inputs(self) -> Axes:
        """Latents [B, C, h, w]."""
        return {"latent_sample": {0: "batch_size", 2: "latent_height", 3: "latent_width"}}

    @property
    def outputs(self) -> Axes:
        """Pixels [B, 3, H, W]."""
        scale = 2 ** (len(self._config.up_block_types) - 1)
        return {"sample": {0: "batch_size", 2: f"latent_height * {scale}", 3: f"latent_width * {scale}"}}


class Called(GraphKind):
    """A module of any other class, described by its recorded calls."""

    def __init__(self, config: Any, inputs: Axes, outputs: Axes) -> None:
        super().__init__(config)
        self._inputs, self._outputs = inputs, outputs

    @property
    def inputs(self) -> Axes:
        """Inputs and their variable axes."""
        return self._inputs

    @property
    def outputs(self) -> Axes:
        """Outputs and their variable axes."""
        return self._outputs


KINDS: dict[str, type[GraphKind]] = {
    "CLIPTextModel": CLIPText,
    "CLIPTextModelWithProjection": CLIPTextWithProjection,
    "CLIPVisionModelWithProjection": CLIPVision,
    "T5EncoderModel": T5Encoder,
    "UNet2DConditionModel": UNet,
}
"""The kinds by module class."""

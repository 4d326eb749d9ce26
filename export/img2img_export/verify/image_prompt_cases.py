"""Image prompts in the comparison of a control graph: PyTorch's outputs are those of diffusers' own processors of IP-Adapters."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from img2img_server.bundle.image_prompts import BIAS, PADDING, STATES

from img2img_export.convert.image_prompts import layers_of
from img2img_export.convert.parts import Tensors

_TOKENS = (4, 3)
"""The number of tokens of each adapter. Row 0 has no image prompt, row 1 that of the first adapter, the others have both."""
_SCALES = [0.8, -0.5]
_WIDTH = 8
"""The width of a token: small, since the processors' weights take memory."""


def random_prompts(unet: Any, rows: int) -> tuple[Tensors, contextlib.AbstractContextManager[None]]:
    """Random inputs of image prompts for the control graph, and a context in which diffusers' UNet has the same ones."""
    generator = torch.Generator("cpu").manual_seed(1)
    tokens = [torch.randn(rows, count, _WIDTH, generator=generator) for count in _TOKENS]
    for adapter, own in enumerate(tokens):
        own[: adapter + 1] = 0
    processors = [_processor(layer.to_q.out_features, generator) for layer in layers_of(unet)]
    bias = torch.zeros(rows, len(tokens), max(_TOKENS))
    parts = []
    with torch.no_grad():
        for processor in processors:
            for projections, scales in ((processor.to_k_ip, (1.0, 1.0)), (processor.to_v_ip, _SCALES)):
                part = torch.zeros(*bias.shape, projections[0].out_features)
                for adapter, (own, project, scale) in enumerate(zip(tokens, projections, scales, strict=True)):
                    part[:, adapter, : own.shape[1]] = project(own) * scale
                parts.append(part)
    for adapter, count in enumerate(_TOKENS):
        bias[1:, adapter, count:] = PADDING
    return {STATES: torch.cat(parts, -1), BIAS: bias}, _as_in_diffusers(unet, processors, tokens)


def _processor(width: int, generator: torch.Generator) -> Any:
    processor: Any = IPAdapterAttnProcessor2_0(width, _WIDTH, _TOKENS, list(_SCALES))
    for parameter in processor.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / _WIDTH**0.5
    return processor


@contextlib.contextmanager
def _as_in_diffusers(unet: Any, processors: Sequence[Any], tokens: list[torch.Tensor]) -> Iterator[None]:
    """Within the block the UNet's cross-attentions have these processors, which get the tokens beside the text."""
    layers = layers_of(unet)
    own = [layer.processor for layer in layers]
    for layer, processor in zip(layers, processors, strict=True):
        layer.set_processor(processor)
    try:
        with patch.object(
            unet, "process_encoder_hidden_states", lambda encoder_hidden_states, **_: (encoder_hidden_states, tokens)
        ):
            yield
    finally:
        for layer, processor in zip(layers, own, strict=True):
            layer.set_processor(processor)

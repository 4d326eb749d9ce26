"""ControlNets of Flux: the graph of one, and the control graph of Flux's transformer, to whose blocks it adds their residuals.

A ControlNet has fewer samples than the transformer has blocks, and diffusers gives each to several blocks. Which block gets which
sample is an input of the control graph, so that ControlNets of any number of layers share it. Rows without a ControlNet have
zeros.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from img2img_server.bundle.controls import FAMILY, IMAGE, MODE, SAMPLE_OF, SAMPLES, SCALE, SINGLE_OF, SINGLES

from img2img_export.convert.graph_kinds import Axes
from img2img_export.convert.parts import Part, Tensors
from img2img_export.convert.token_graphs import FluxKind, flux_arguments

_ROWS = {0: "batch_size"}
_TOKENS = {0: "batch_size", 2: "packed_height_width"}
"""Axes of samples [B, K, N, D] of a ControlNet, whose K is fixed."""
_EXAMPLE_SAMPLES = {SAMPLES: 2, SINGLES: 3}
"""Numbers of samples to trace and compare with."""


class FluxControlNet(FluxKind):
    """A ControlNet of Flux, alone or a union."""

    @property
    def inputs(self) -> Axes:
        """The transformer's inputs; control images as packed latents [B, N, C] or, if it has layers for them, pixels
        [B, 3, H, W]; their kinds [B] for a union; scales [B]."""
        names = super().inputs
        if reads_pixels(self._config):
            names[IMAGE] = {**_ROWS, 2: "image_height", 3: "image_width"}
        else:
            names[IMAGE] = names["hidden_states"]
        return names | ({MODE: _ROWS} if is_union(self._config) else {}) | {SCALE: _ROWS}

    @property
    def outputs(self) -> Axes:
        """The samples [B, K, N, D]."""
        counts = {SAMPLES: self._config.num_layers, SINGLES: self._config.num_single_layers}
        return {name: _TOKENS for name, count in counts.items() if count}

    def call(self, model: Any, inputs: Tensors) -> Tensors:
        """Runs diffusers' `model` on the graph's inputs."""
        with flux_arguments(model, inputs) as arguments:
            return self.samples(model, arguments | self.control(inputs))

    def samples(self, model: Any, call: dict[str, Any]) -> Tensors:
        """The outputs of diffusers' `model` for a call of it, by name."""
        found = dict(zip((SAMPLES, SINGLES), model(**call, return_dict=False), strict=True))
        return {name: torch.stack(list(found[name]), dim=1) for name in self.outputs}

    def control(self, inputs: Tensors) -> dict[str, Any]:
        """The arguments of diffusers' class that only ControlNets have, for the graph's inputs."""
        modes = {"controlnet_mode": inputs[MODE][:, None]} if is_union(self._config) else {}
        return {"controlnet_cond": inputs[IMAGE], "conditioning_scale": inputs[SCALE][:, None, None], **modes}


def reads_pixels(config: Any) -> bool:
    """Whether a ControlNet of this configuration reads pixels (XLabs'), and not latents of the model's VAE (InstantX')."""
    return config.conditioning_embedding_channels is not None


def is_union(config: Any) -> bool:
    """Whether a ControlNet of this configuration reads images of several kinds, which its calls name."""
    return config.num_mode is not None


def control_part(module: Any) -> tuple[Part, FluxControlNet]:
    """A ControlNet: from the transformer's inputs and control images to the samples, multiplied by the scales."""
    kind = FluxControlNet(module.config)
    return Part(FAMILY, FAMILY, kind.inputs, kind.outputs, kind.call, kind), kind


def controlled(part: Part) -> Part:
    """The transformer's part with samples of ControlNets, and the index of each block's sample, as further inputs."""
    axes: Axes = {
        SAMPLES: {**_TOKENS, 1: "samples"}, SAMPLE_OF: _ROWS, SINGLES: {**_TOKENS, 1: "single_samples"}, SINGLE_OF: _ROWS
    }  # fmt: skip

    def call(transformer: Any, tensors: Tensors) -> Tensors:
        own = {name: tensors[name] for name in part.inputs}
        given = {
            name: [tensors[name].index_select(1, tensors[index][0, block : block + 1])[:, 0] for block in range(count)]
            for name, index, count in _blocks(transformer)
        }
        with _adding(transformer, given):
            return part.call(transformer, own)

    return replace(part, inputs={**part.inputs, **axes}, call=call)


def residuals_like(module: Any, tensors: Tensors) -> Tensors:
    """Zeros in shapes of samples for a call of the transformer, with indices, by name."""
    rows, tokens = tensors["hidden_states"].shape[:2]
    found: Tensors = {}
    for name, index, count in _blocks(module):
        samples = _EXAMPLE_SAMPLES[name]
        found[name] = torch.zeros(rows, samples, tokens, module.inner_dim)
        found[index] = (torch.arange(count) % samples).repeat(rows, 1)
    return found


def _blocks(transformer: Any) -> tuple[tuple[str, str, int], tuple[str, str, int]]:
    """For blocks and single blocks: the names of their samples and indices, and their number."""
    blocks, singles = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    return (SAMPLES, SAMPLE_OF, blocks), (SINGLES, SINGLE_OF, singles)


@contextlib.contextmanager
def _adding(transformer: Any, samples: dict[str, list[torch.Tensor]]) -> Iterator[None]:
    """Passes a sample for every block to calls of the transformer within the block."""

    def add(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, **samples}

    hook = transformer.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()

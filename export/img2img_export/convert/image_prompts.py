"""Image prompts in the control graph of a UNet: each cross-attention adds that of its query with keys and values that are inputs.

The layout of the inputs is in bundle/image_prompts.py. The attention of all adapters is two products: of the query with the keys
of all their tokens, and, after a softmax over each adapter's tokens, with all values, which sums over adapters. Hooks add it
between the UNet's own attention and its output layer, so that the rest of the graph is that of the plain one.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from img2img_server.bundle.image_prompts import ADAPTERS, BIAS, STATES, TOKENS, layer_widths, states_width
from torch.onnx import JitScalarType  # type: ignore[attr-defined]

from img2img_export.convert.parts import Part, Tensors

_EXAMPLE_ADAPTERS, _EXAMPLE_TOKENS = 3, 5


def layers_of(unet: Any) -> list[Any]:
    """The cross-attentions of a UNet that image prompts are for, in the order of the inputs; empty if it takes none."""
    widths = layer_widths({**unet.config, "_class_name": type(unet).__name__})
    if not widths:
        return []
    names = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    layers = [unet.get_submodule(name.removesuffix(".processor")) for name in names]
    assert tuple(layer.to_q.out_features for layer in layers) == widths, "config.json gives the UNet's cross-attentions"
    return layers


def prompted(part: Part, unet: Any) -> Part:
    """The part of a UNet's control graph with the inputs of image prompts, if the UNet takes them."""
    if not layers_of(unet):
        return part
    axes = {0: "batch_size", 1: ADAPTERS, 2: TOKENS}

    def call(module: Any, tensors: Tensors) -> Tensors:
        with _attending(layers_of(module), tensors[STATES], tensors[BIAS]):
            return part.call(module, {name: tensors[name] for name in part.inputs})

    return replace(part, inputs={**part.inputs, STATES: axes, BIAS: axes}, call=call)


def example_inputs(unet: Any, rows: int) -> Tensors:
    """Inputs to trace with, beside the control graph's other ones; empty if the UNet takes no image prompts."""
    width = states_width([layer.to_q.out_features for layer in layers_of(unet)])
    shape = (rows, _EXAMPLE_ADAPTERS, _EXAMPLE_TOKENS)
    return {STATES: torch.zeros(*shape, width), BIAS: torch.zeros(shape)} if width else {}


@contextlib.contextmanager
def _attending(layers: list[Any], states: torch.Tensor, bias: torch.Tensor) -> Iterator[None]:
    """Adds the attention of the image tokens in calls of the UNet within the block."""
    width = states_width([layer.to_q.out_features for layer in layers])
    tokens = _Tokens(*_Prepare.apply(states, bias, width))  # type: ignore[no-untyped-call]
    start = 0
    with contextlib.ExitStack() as stack:
        for layer in layers:
            queries: list[torch.Tensor] = []

            def take(_: Any, given: Any, output: torch.Tensor, queries: list[torch.Tensor] = queries) -> None:
                queries.append(output)

            def add(
                _: Any,
                given: tuple[torch.Tensor, ...],
                queries: list[torch.Tensor] = queries,
                heads: int = layer.heads,
                width: int = layer.to_q.out_features,
                start: int = start,
            ) -> tuple[torch.Tensor]:
                own: torch.Tensor = _Attend.apply(queries.pop(), *tokens, start, heads, width // heads)  # type: ignore[no-untyped-call]
                return (given[0] + own,)

            # Hooks of LoRAs are registered before: the query has their product.
            stack.callback(layer.to_q.register_forward_hook(take).remove)
            stack.callback(layer.to_out[0].register_forward_pre_hook(add).remove)
            start += 2 * layer.to_q.out_features
        yield


class _Tokens(NamedTuple):
    """The values that the layers share: keys and values of all tokens [B, A * T, W], their bias [B, 1, 1, A * T], and the shape
    of scores [B, H, N, A, T] for a Reshape."""

    states: torch.Tensor
    bias: torch.Tensor
    split: torch.Tensor


class _Prepare(torch.autograd.Function):
    """The fields of `_Tokens`, from the graph's inputs.

    Traced as this and `_Attend`, the graph has a third of the nodes that torch makes, which computes each size from a shape.
    """

    @staticmethod
    def symbolic(g: Any, states: Any, bias: Any, width: int) -> Any:
        flat = g.op("Reshape", states, _constant(g, 0, -1, width))
        tokens = g.op("Shape", bias, start_i=2, end_i=3)
        split = g.op("Concat", _constant(g, 0, 0, 0, -1), tokens, axis_i=0)
        return flat, g.op("Reshape", bias, _constant(g, 0, 1, 1, -1)), split

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, bias: torch.Tensor, width: int) -> tuple[torch.Tensor, ...]:
        return states.flatten(1, 2), bias.flatten(1)[:, None, None], torch.tensor([0, 0, 0, -1, bias.shape[2]])


class _Attend(torch.autograd.Function):
    """The attention [B, N, H * D] of a query [B, N, H * D] to the keys and values that begin at `start` in the states."""

    @staticmethod
    def symbolic(g: Any, query: Any, states: Any, bias: Any, split: Any, start: int, heads: int, size: int) -> Any:
        width, last = heads * size, _constant(g, 2)
        ends = (start, start + width)
        keys, values = (g.op("Slice", states, _constant(g, at), _constant(g, at + width), last) for at in ends)
        scale = g.op("Constant", value_t=torch.tensor(size**-0.5, dtype=JitScalarType.from_value(states).dtype()))
        by_head = _constant(g, 0, -1, heads, size)
        queries = g.op("Transpose", g.op("Reshape", query, by_head), perm_i=[0, 2, 1, 3])
        keys = g.op("Transpose", g.op("Reshape", g.op("Mul", keys, scale), by_head), perm_i=[0, 2, 3, 1])
        values = g.op("Transpose", g.op("Reshape", values, by_head), perm_i=[0, 2, 1, 3])
        scores = g.op("Reshape", g.op("Add", g.op("MatMul", queries, keys), bias), split)
        weights = g.op("Reshape", g.op("Softmax", scores, axis_i=-1), _constant(g, 0, 0, 0, -1))
        found = g.op("Transpose", g.op("MatMul", weights, values), perm_i=[0, 2, 1, 3])
        return g.op("Reshape", found, _constant(g, 0, -1, width)).setType(query.type())

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        states: torch.Tensor,
        bias: torch.Tensor,
        split: torch.Tensor,
        start: int,
        heads: int,
        size: int,
    ) -> torch.Tensor:
        parts = (query, *states[..., start : start + 2 * heads * size].chunk(2, -1))
        query, keys, values = (part.view(*part.shape[:2], heads, size).transpose(1, 2) for part in parts)
        scores = query @ (keys * size**-0.5).transpose(2, 3) + bias
        weights = scores.view(*scores.shape[:3], -1, int(split[-1])).softmax(-1).flatten(3)
        return torch.matmul(weights, values).transpose(1, 2).flatten(2)


def _constant(g: Any, *numbers: int) -> Any:
    return g.op("Constant", value_t=torch.tensor(numbers))

"""A second graph of a transformer, whose attention is ONNX Runtime's operator MultiHeadAttention, for CUDA and the CPU provider.

The plain graph has attention as products and a softmax, whose scores take gigabytes for thousands of tokens. The CUDA provider
has kernels for the operator that keep none: cuDNN's, Flash, and in fp32 CUTLASS', with a bias for a multiple of 16 tokens. The
CPU provider has one in fp32.
The second graph is traced like the plain one and has the same weights, so both share the plain graph's file of weights.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import torch
from img2img_server.bundle.manifest import FUSED_ATTENTION
from onnx import ModelProto, helper
from torch.onnx import symbolic_helper
from torch.onnx.symbolic_opset9 import unused

from img2img_export.convert.external_weights import GRAPH_NAME, TORCH_TYPES, ExternalWeightsGraph
from img2img_export.errors import ExportError


def name_of(graph: str) -> str:
    """The file name of the second graph of a graph, beside it: that of "lora.onnx" is "lora_fused_attention.onnx"."""
    return graph.removesuffix(".onnx") + FUSED_ATTENTION


NAME = name_of(GRAPH_NAME)
"""File name of the second graph of the plain one."""

DOMAIN = "com.microsoft"
OPERATOR = "MultiHeadAttention"


class _MultiHeadAttention(torch.autograd.Function):
    """Attention of queries, keys and values [B, S, heads * D] with a bias [B or 1, heads or 1, S, S] or None."""

    @staticmethod
    def symbolic(g: Any, query: Any, key: Any, value: Any, bias: Any, heads: int, scale: float) -> Any:
        absent = unused(g)  # type: ignore[no-untyped-call]
        given = (query, key, value, absent, absent, absent if symbolic_helper._is_none(bias) else bias)
        result = g.op(f"{DOMAIN}::{OPERATOR}", *given, num_heads_i=heads, scale_f=scale)
        return result.setType(query.type())

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, bias: Any, heads: int, scale: float) -> torch.Tensor:
        parts = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
        found: torch.Tensor = torch.ops.aten.scaled_dot_product_attention(*parts, attn_mask=bias, scale=scale)
        return found.transpose(1, 2).flatten(2)


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
    """torch's attention of [B, heads, S, D] by the operator."""
    if is_causal or settings.get("enable_gqa"):
        raise ExportError("fused attention is neither causal nor of grouped queries")
    heads, width = int(query.shape[1]), int(query.shape[-1])
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.to(query.dtype).expand(-1, -1, query.shape[2], -1)
    parts = (part.transpose(1, 2).flatten(2) for part in (query, key, value))
    joined: Any = _MultiHeadAttention.apply(  # type: ignore[no-untyped-call]
        *parts, attn_mask, heads, 1 / math.sqrt(width) if scale is None else scale
    )
    # The tracer knows the operator's result only by its size in the example, and turns values that depend on it into constants.
    states: torch.Tensor = joined.view(query.shape[0], query.shape[2], heads, width).transpose(1, 2)
    return states


@contextlib.contextmanager
def fusing() -> Iterator[None]:
    """Within it, torch's attention is traced as the operator."""
    with patch.object(torch.nn.functional, "scaled_dot_product_attention", _attend):
        yield


def declare_types(model: ModelProto, dtype: torch.dtype) -> None:
    """Declares the type of the operators' results, which onnx cannot infer, and not the example's shape, which torch declares."""
    if not any(item.domain == DOMAIN for item in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    results = [node.output[0] for node in model.graph.node if node.domain == DOMAIN]
    others = [value for value in model.graph.value_info if value.name not in results]
    del model.graph.value_info[:]
    model.graph.value_info.extend(others)
    model.graph.value_info.extend(helper.make_tensor_value_info(name, TORCH_TYPES[dtype], None) for name in results)


def write_beside(graph: ExternalWeightsGraph, folder: Path, name: str = NAME) -> None:
    """Writes the graph into `folder` as the file `name`, with the weights of the plain graph there. Raises ExportError if one is
    not among them."""
    plain = onnx.load(str(folder / GRAPH_NAME), load_external_data=False)
    written = {item.name: item for item in plain.graph.initializer}
    if missing := [weight for weight in graph.weights if weight not in written]:
        raise ExportError(f"the plain graph has no weight {missing[0]}")
    model = ModelProto()
    model.CopyFrom(graph.model)
    model.graph.initializer.extend(written[weight] for weight in graph.weights)
    if not any(node.op_type == OPERATOR for node in model.graph.node):
        raise ExportError("it has no attention that the operator computes")
    onnx.save(model, str(folder / name))

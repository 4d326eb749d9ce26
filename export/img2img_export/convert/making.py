"""Makes a graph in a precision and a format of weights."""

from typing import Any

import torch
from img2img_server.bundle.manifest import Precision, WeightFormat

from img2img_export.convert.external_weights import ExternalWeightsGraph
from img2img_export.convert.parts import Part, Tensors
from img2img_export.convert.tracing import trace

STATIC_GRAPHS = ("unet", "vae_decoder")
"""The graphs that are in static int8."""


def make(
    module: Any,
    part: Part,
    example: Tensors,
    precision: Precision,
    narrow: WeightFormat,
    group_size: int,
    fused_attention: bool = False,
) -> ExternalWeightsGraph:
    """The graph of `module` called with inputs like `example` in `precision`, with weights in the format `narrow`, if any, in
    blocks of `group_size`. Static int8 is made of a graph in fp32 (static_int8.py). Raises ExportError if torch cannot do it."""
    graph = _in_precision(module, part, example, precision, fused_attention)
    if not narrow:
        return graph
    from img2img_export.convert.weight_only import to_weight_only

    return to_weight_only(graph, narrow, group_size)


def _in_precision(module: Any, part: Part, example: Tensors, precision: Precision, fused_attention: bool) -> ExternalWeightsGraph:
    if precision == "fp32":
        return trace(module, part, example, fused_attention=fused_attention)
    if precision == "int8" and part.name not in STATIC_GRAPHS:
        from img2img_export.convert.quantize import to_int8

        return to_int8(trace(module, part, example))
    if precision == "int8":
        return trace(module, part, example)
    graph = trace(module, part, example, torch.float16, fused_attention, for_bf16=precision == "bf16")
    if precision == "bf16":
        from img2img_export.convert.bfloat16 import to_bfloat16

        return to_bfloat16(graph)
    return graph

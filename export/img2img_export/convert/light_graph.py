"""The light graph of a UNet: its first convolution and its last layer, on the deep features of an earlier step.

DeepCache (https://arxiv.org/abs/2312.00858) found that deep features change little from step to step. The whole graph has them as
a second output. The light graph is cut out of it, so it shares the weights' file, and its numbers are the same.
"""

from dataclasses import replace
from typing import Any

import torch
from img2img_server.bundle.speedups import FEATURES
from onnx import ModelProto
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from img2img_export.convert.external_weights import ExternalWeightsGraph
from img2img_export.convert.parts import Part, Tensors
from img2img_export.convert.split_graph import subgraph

_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
"""Up blocks whose last layer takes the output of the one before it, and that of the UNet's first convolution."""


def has_light_graph(module: Any) -> bool:
    """Whether `module` is a UNet whose last layer can be cut off."""
    if type(module).__name__ != "UNet2DConditionModel":
        return False
    block = module.up_blocks[-1]
    return type(block).__name__ in _BLOCKS and len(block.resnets) > 1


def with_features(part: Part, module: Any) -> Part:
    """The part with the deep features as a second output."""
    (output,) = part.outputs
    layer = _names(module)[1]

    def call(unet: Any, tensors: Tensors) -> Tensors:
        found: list[torch.Tensor] = []

        def keep(_: Any, __: Any, given: Any) -> None:
            found.append(given[0] if isinstance(given, tuple) else given)

        hook = unet.get_submodule(layer).register_forward_hook(keep)
        try:
            return {**part.call(unet, tensors), FEATURES: found[-1]}
        finally:
            hook.remove()

    return replace(part, outputs={**part.outputs, FEATURES: part.outputs[output]}, call=call)


def cut(graph: ExternalWeightsGraph) -> ExternalWeightsGraph:
    """The light graph of a whole one with the deep features as an output."""
    model: ModelProto = graph.model
    (features,) = (item for item in model.graph.output if item.name == FEATURES)
    given = [item.name for item in model.graph.input]
    light = subgraph(model, [*given, FEATURES], [item.name for item in model.graph.output if item.name != FEATURES])
    light.graph.input.append(features)
    made = ExternalWeightsGraph(light, dict(graph.weights))
    made.drop_unused()
    return made


def light_cost(module: Any, part: Part, example: Tensors) -> float:
    """The floating-point operations of the light graph, relative to those of the whole one. Counted on fake tensors of the
    model's own size, which compute nothing."""
    latents = getattr(module.config, "sample_size", None)
    sides = (latents, latents) if isinstance(latents, int) else tuple(latents or example["sample"].shape[2:])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), FlopCounterMode(display=False) as counter:
        given = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in example.items()}
        given["sample"] = torch.zeros(*example["sample"].shape[:2], *sides)
        part.call(module, given)
    root = type(module).__name__
    counts = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
    light = sum(counts.get(f"{root}.{name}", 0) for name in _names(module)[0])
    return float(light / counts["Global"])


def _names(module: Any) -> tuple[tuple[str, ...], str]:
    """The names of the modules in the light graph, and of the one whose output are the deep features."""
    block = module.up_blocks[-1]
    last, where = len(block.resnets) - 1, f"up_blocks.{len(module.up_blocks) - 1}"
    kind = "attentions" if hasattr(block, "attentions") else "resnets"
    inside = ("conv_in", "time_embedding", f"{where}.resnets.{last}", f"{where}.attentions.{last}", "conv_out")
    return inside, f"{where}.{kind}.{last - 1}"

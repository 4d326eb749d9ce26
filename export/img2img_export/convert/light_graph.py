"""The light graph of a denoiser: its outer layers, on features of an earlier step, which the whole graph has as a second output.

Of a UNet these are the first convolution and the last layer, and the features are the hidden states between them: DeepCache
(https://arxiv.org/abs/2312.00858) found that these change little from step to step. Of a transformer these are the first block
and the last projection; the features are what all other blocks add to the image's tokens, as in the first-block cache of
ParaAttention (https://github.com/chengzeyi/ParaAttention). Text tokens are not needed after the first block, so none are kept.

The light graph is cut out of the whole one, so it shares the weights' file, and its numbers are the same.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from img2img_server.bundle.speedups import FEATURES
from onnx import ModelProto, helper
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from img2img_export.convert.external_weights import ExternalWeightsGraph
from img2img_export.convert.parts import Part, Tensors
from img2img_export.convert.split_graph import subgraph
from img2img_export.errors import ExportError

_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
"""Up blocks whose last layer takes the output of the one before it, and that of the UNet's first convolution."""
_TRANSFORMERS = ("SD3Transformer2DModel", "FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel")
"""Transformers whose blocks return tokens of the text and of the image, and whose last norm takes those of the image."""
_TOKENS = {0: "batch_size", 1: "feature_tokens"}


def has_light_graph(module: Any) -> bool:
    """Whether `module` is a UNet whose last layer can be cut off, or a transformer of several blocks."""
    if _is_transformer(module):
        return len([*module.transformer_blocks, *getattr(module, "single_transformer_blocks", ())]) > 1
    if type(module).__name__ != "UNet2DConditionModel":
        return False
    block = module.up_blocks[-1]
    return type(block).__name__ in _BLOCKS and len(block.resnets) > 1


def with_features(part: Part, module: Any) -> Part:
    """The part with the features as a second output."""
    (output,) = part.outputs
    axes = _TOKENS if _is_transformer(module) else part.outputs[output]

    def call(denoiser: Any, tensors: Tensors) -> Tensors:
        with watching(denoiser) as seen:
            outputs = part.call(denoiser, tensors)
        return {**outputs, FEATURES: seen.features}

    return replace(part, outputs={**part.outputs, FEATURES: axes}, call=call)


class Seen:
    """The recorded states of a denoiser's last call: those after its first layers and before its last ones."""

    first: torch.Tensor | None = None
    last: torch.Tensor

    @property
    def features(self) -> torch.Tensor:
        """The features of the call."""
        return self.last if self.first is None else self.last - self.first


@contextlib.contextmanager
def watching(module: Any) -> Iterator[Seen]:
    """Within it, calls of `module` are seen."""
    seen = Seen()

    def leave(_: Any, __: Any, made: Any) -> None:
        seen.last = made[0] if isinstance(made, tuple) else made

    def enter(_: Any, __: Any, made: Any) -> None:
        seen.first = made[1]  # the image's tokens, after the text's

    def end(_: Any, given: tuple[Any, ...]) -> None:
        seen.last = given[0]

    if _is_transformer(module):
        hooks = [module.transformer_blocks[0].register_forward_hook(enter), module.norm_out.register_forward_pre_hook(end)]
    else:
        hooks = [module.get_submodule(_names(module)[1]).register_forward_hook(leave)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def cut(graph: ExternalWeightsGraph, module: Any) -> ExternalWeightsGraph:
    """The light graph of a whole one, of `module`, with the features as an output."""
    model: ModelProto = graph.model
    (features,) = (item for item in model.graph.output if item.name == FEATURES)
    given = [item.name for item in model.graph.input]
    outputs = [item.name for item in model.graph.output if item.name != FEATURES]
    light = _without_blocks(model, given, outputs) if _is_transformer(module) else subgraph(model, [*given, FEATURES], outputs)
    light.graph.input.append(features)
    made = ExternalWeightsGraph(light, dict(graph.weights))
    made.drop_unused()
    return made


def _without_blocks(model: ModelProto, given: list[str], outputs: list[str]) -> ModelProto:
    """The graph of a transformer whose tokens before the last layer are those after the first block plus the features."""
    difference = next(node for node in model.graph.node if FEATURES in node.output)
    if difference.op_type != "Sub":
        raise ExportError(f"the features are the output of {difference.op_type}, not of a difference")
    last, first = difference.input
    light = subgraph(model, [*given, last], [*outputs, first])
    del light.graph.output[:]
    light.graph.output.extend(item for item in model.graph.output if item.name in outputs)
    nodes = list(light.graph.node)
    after = next(index for index, node in enumerate(nodes) if first in node.output) + 1
    nodes.insert(after, helper.make_node("Add", [first, FEATURES], [last], "features"))
    del light.graph.node[:]
    light.graph.node.extend(nodes)
    return light


def light_cost(module: Any, part: Part, example: Tensors) -> float:
    """The floating-point operations of the light graph, relative to those of the whole one. Counted on fake tensors, which
    compute nothing: of a UNet of the model's own size, of a transformer of the example's."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), FlopCounterMode(display=False) as counter:
        given = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in example.items()}
        if _is_transformer(module):
            return _outer_cost(module, part, given, counter)
        latents = getattr(module.config, "sample_size", None)
        sides = (latents, latents) if isinstance(latents, int) else tuple(latents or example["sample"].shape[2:])
        given["sample"] = torch.zeros(*example["sample"].shape[:2], *sides)
        part.call(module, given)
    root = type(module).__name__
    counts = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
    light = sum(counts.get(f"{root}.{name}", 0) for name in _names(module)[0])
    return float(light / counts["Global"])


def _outer_cost(module: Any, part: Part, given: Tensors, counter: FlopCounterMode) -> float:
    """The operations up to the first block's end and from the last norm on, relative to all."""
    seen: list[int] = []
    hooks = [
        module.transformer_blocks[0].register_forward_hook(lambda *_: seen.append(counter.get_total_flops())),
        module.norm_out.register_forward_pre_hook(lambda *_: seen.append(counter.get_total_flops())),
    ]
    try:
        part.call(module, given)
    finally:
        for hook in hooks:
            hook.remove()
    first, last = seen
    return float((first + counter.get_total_flops() - last) / counter.get_total_flops())


def _is_transformer(module: Any) -> bool:
    return type(module).__name__ in _TRANSFORMERS


def _names(module: Any) -> tuple[tuple[str, ...], str]:
    """The names of the modules in a UNet's light graph, and of the one whose output are the deep features."""
    block = module.up_blocks[-1]
    last, where = len(block.resnets) - 1, f"up_blocks.{len(module.up_blocks) - 1}"
    kind = "attentions" if hasattr(block, "attentions") else "resnets"
    inside = ("conv_in", "time_embedding", f"{where}.resnets.{last}", f"{where}.attentions.{last}", "conv_out")
    return inside, f"{where}.{kind}.{last - 1}"

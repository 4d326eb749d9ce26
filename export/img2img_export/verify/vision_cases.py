"""The comparisons for CLIP's image encoder: random pixels, a smooth image, and the empty one."""

from typing import Any

import torch
from img2img_server.bundle.image_encoders import EMBEDS, FAMILY, PIXELS, STATES

from img2img_export.convert.graph_kinds import CLIPVision
from img2img_export.convert.parts import Part, Tensors
from img2img_export.verify.parity import Case

_BEFORE_LAST = -2
"""The hidden states that IP-Adapters read, as in diffusers' encode_image."""


def described(module: Any) -> tuple[Part, Tensors, list[Case]]:
    """The graph of an image encoder, inputs to trace it with, and its comparisons. It must compute in fp32."""
    kind = CLIPVision(module.config)
    part = Part(FAMILY, FAMILY, kind.inputs, kind.outputs, _call, kind)
    side = module.config.image_size
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(4, 3, side, side, generator=generator)
    ramp = torch.linspace(-1.8, 2.1, side)
    smooth = torch.stack([ramp[:, None].expand(-1, side), ramp.expand(side, -1), ramp.flip(0).expand(side, -1)])
    several = torch.stack([noise[3], smooth, torch.zeros_like(smooth)])
    batches = {"random, batch 1": noise[:1], "random, smooth and empty, batch 3": several}
    return part, {PIXELS: noise[1:3]}, [_case(f"{name}, {side} x {side}", part, module, batches[name]) for name in batches]


def _call(module: Any, inputs: Tensors) -> Tensors:
    found = module(**inputs, output_hidden_states=True, return_dict=True)
    return {EMBEDS: found.image_embeds, STATES: found.hidden_states[_BEFORE_LAST]}


def _case(name: str, part: Part, module: Any, pixels: torch.Tensor) -> Case:
    inputs = {PIXELS: pixels}
    with torch.no_grad():
        outputs = part.call(module, inputs)
    return Case(name, inputs, {key: value.float().numpy() for key, value in outputs.items()}, is_random=True)

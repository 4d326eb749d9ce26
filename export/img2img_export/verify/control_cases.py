"""The comparisons for ControlNets and control graphs, on random inputs."""

from typing import Any

import torch
from img2img_server.bundle.controls import IMAGE, SCALE

from img2img_export.convert.control_graph import controlled, residuals_like
from img2img_export.convert.parts import Part, Tensors
from img2img_export.verify.parity import Case

_BATCHES = ((1, 8, 8), (3, 9, 13))
"""Rows, and height and width of the latents. The second size is odd."""
_TOKENS = 77
_TIMESTEPS = (961.0, 401.0, 1.0)
_SCALES = (1.0, 0.5, -1.5)
_TIME_IDS = 6
"""Numbers of SDXL's base model that say the image's size."""
_SPREAD = 0.3
"""Of random residuals. The states that they are added to have about 1."""


def example_inputs(module: Any, rows: int, height: int, width: int) -> Tensors:
    """Random inputs of a ControlNet for latents of that size."""
    config, generator = module.config, torch.Generator("cpu").manual_seed(rows)
    text_width = config.encoder_hid_dim or config.cross_attention_dim
    inputs = {
        "sample": torch.randn(rows, config.in_channels, height, width, generator=generator),
        "timestep": torch.tensor(_TIMESTEPS[:rows]),
        "encoder_hidden_states": torch.randn(rows, _TOKENS, text_width, generator=generator),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - _TIME_IDS * config.addition_time_embed_dim
        inputs["text_embeds"] = torch.randn(rows, pooled, generator=generator)
        inputs["time_ids"] = torch.full((rows, _TIME_IDS), 512.0)
    scale = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
    inputs[IMAGE] = torch.rand(rows, config.conditioning_channels, scale * height, scale * width, generator=generator)
    return inputs | {SCALE: torch.tensor(_SCALES[:rows])}


def control_cases(part: Part, module: Any) -> list[Case]:
    """The comparisons for a ControlNet, which must compute in fp32."""
    made = []
    for rows, height, width in _BATCHES:
        inputs = example_inputs(module, rows, height, width)
        made.append(_case(f"random, batch {rows}, {height} x {width}", part, module, inputs))
    return made


def residual_case(part: Part, module: Any, case: Case) -> tuple[Part, Case]:
    """The part of a UNet's control graph, and its comparison: the inputs of `case`, its first row without residuals.

    The UNet must compute in fp32.
    """
    generator, residuals = torch.Generator("cpu").manual_seed(0), residuals_like(part, module, case.inputs)
    control = controlled(part, len(residuals))
    for value in residuals.values():
        value[1:] = torch.randn(value[1:].shape, generator=generator) * _SPREAD
    return control, _case(f"{case.name}, residuals", control, module, {**case.inputs, **residuals})


def _case(name: str, part: Part, module: Any, inputs: Tensors) -> Case:
    with torch.no_grad():
        outputs = part.call(module, inputs)
    return Case(name, inputs, {key: value.float().numpy() for key, value in outputs.items()}, is_random=True)

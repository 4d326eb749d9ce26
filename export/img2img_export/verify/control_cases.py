"""The comparisons for ControlNets and control graphs, on random inputs."""

from dataclasses import replace
from typing import Any

import torch
from img2img_server.bundle.controls import FLUX_CLASS, IMAGE, MODE, SCALE

from img2img_export.convert import control_graph, flux_control, image_prompts
from img2img_export.convert.parts import Part, Tensors
from img2img_export.verify import image_prompt_cases
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
_PIXELS = 16
"""Pixels of a token of Flux, on each side."""


def described(module: Any, height: int, width: int) -> tuple[Part, Tensors, list[Case]]:
    """The graph of a ControlNet, inputs to trace it with, of that size, and its comparisons. It must compute in fp32."""
    is_flux = type(module).__name__ == FLUX_CLASS
    part, make = (flux_control.control_part(module), _flux_inputs) if is_flux else (control_graph.control_part(module), _inputs)
    cases = [_case(f"random, batch {rows}, {h} x {w}", part, module, make(module, rows, h, w)) for rows, h, w in _BATCHES]
    return part, make(module, 2, height, width), cases


def _flux_inputs(module: Any, rows: int, height: int, width: int) -> Tensors:
    """Random inputs of a ControlNet of Flux for that many tokens."""
    config, generator = module.config, torch.Generator("cpu").manual_seed(rows)
    tokens = height * width
    places = torch.cartesian_prod(torch.arange(height, dtype=torch.float32), torch.arange(width, dtype=torch.float32))
    inputs = {
        "hidden_states": torch.randn(rows, tokens, config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(rows, _TOKENS, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(rows, config.pooled_projection_dim, generator=generator),
        "timestep": torch.tensor(_TIMESTEPS[:rows]) / 1000,
        "txt_ids": torch.zeros(_TOKENS, 3),
        "img_ids": torch.nn.functional.pad(places, (1, 0)),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.linspace(1, 7, rows)
    if flux_control.reads_pixels(config):
        inputs[IMAGE] = 2 * torch.rand(rows, 3, _PIXELS * height, _PIXELS * width, generator=generator) - 1
    else:
        inputs[IMAGE] = torch.randn(rows, tokens, config.in_channels, generator=generator)
    if flux_control.is_union(config):
        inputs[MODE] = torch.arange(rows) % config.num_mode
    return inputs | {SCALE: torch.tensor(_SCALES[:rows])}


def _inputs(module: Any, rows: int, height: int, width: int) -> Tensors:
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
    if control_graph.is_union(config):
        inputs[MODE] = torch.arange(rows) % config.num_control_type
    return inputs | {SCALE: torch.tensor(_SCALES[:rows])}


def residual_case(part: Part, module: Any, example: Tensors, case: Case) -> tuple[Part, Tensors, Case]:
    """The part of a denoiser's control graph, its further inputs to trace it with beside `example`, and its comparison: the
    inputs of `case`, its first row without residuals, and without image prompts if the denoiser takes them.

    The denoiser must compute in fp32.
    """
    if "hidden_states" in part.inputs:
        control = flux_control.controlled(part)
        traced, residuals = (flux_control.residuals_like(module, tensors) for tensors in (example, case.inputs))
        return control, traced, _case(_named(case), control, module, case.inputs | _filled(residuals))
    traced, residuals = (control_graph.residuals_like(part, module, tensors) for tensors in (example, case.inputs))
    control = control_graph.controlled(part, len(residuals))
    inputs = case.inputs | _filled(residuals)
    if not image_prompts.layers_of(module):
        return control, traced, _case(_named(case), control, module, inputs)
    prompts, in_diffusers = image_prompt_cases.random_prompts(module, _rows(inputs))
    with in_diffusers:
        made = _case(f"{_named(case)} and image prompts", control, module, inputs)
    further = traced | image_prompts.example_inputs(module, _rows(example))
    return image_prompts.prompted(control, module), further, replace(made, inputs=inputs | prompts)


def _filled(residuals: Tensors) -> Tensors:
    """The residuals with random values in all rows but the first."""
    generator = torch.Generator("cpu").manual_seed(0)
    for value in residuals.values():
        if value.is_floating_point():
            value[1:] = torch.randn(value[1:].shape, generator=generator) * _SPREAD
    return residuals


def _named(case: Case) -> str:
    return f"{case.name}, residuals"


def _rows(inputs: Tensors) -> int:
    return len(next(iter(inputs.values())))


def _case(name: str, part: Part, module: Any, inputs: Tensors) -> Case:
    with torch.no_grad():
        outputs = part.call(module, inputs)
    return Case(name, inputs, {key: value.float().numpy() for key, value in outputs.items()}, is_random=True)

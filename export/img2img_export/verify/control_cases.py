"""The comparisons for ControlNets and control graphs, on random inputs."""

from dataclasses import replace
from typing import Any

import torch
from img2img_server.bundle.controls import FLUX_CLASS, IMAGE, MODE, SCALE
from img2img_server.runtime.onnx import token_graphs

from img2img_export.convert import control_graph, flux_control, image_prompts
from img2img_export.convert.flux_control import FluxControlNet
from img2img_export.convert.parts import Part, Tensors
from img2img_export.convert.token_graphs import Layout
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
"""The standard deviation of random residuals. That of the states that they are added to is about 1."""
_PIXELS = 16
"""Pixels of a token of Flux, on each side."""


def described(module: Any, height: int, width: int) -> tuple[Part, Tensors, list[Case]]:
    """The graph of a ControlNet, inputs to trace it with, of that size, and its comparisons. It must compute in fp32."""
    if type(module).__name__ == FLUX_CLASS:
        return _described_of_flux(module, height, width)
    part = control_graph.control_part(module)
    cases = [_case(_random(rows, h, w), part, module, _inputs(module, rows, h, w)) for rows, h, w in _BATCHES]
    return part, _inputs(module, 2, height, width), cases


def _described_of_flux(module: Any, height: int, width: int) -> tuple[Part, Tensors, list[Case]]:
    """The same as `described`. The expected samples of each row are those of diffusers' own `forward` for the row alone."""
    part, kind = flux_control.control_part(module)
    cases = []
    for rows, h, w in _BATCHES:
        inputs, calls = _flux_inputs(kind, module.config, rows, h, w)
        with torch.no_grad():
            found = [kind.samples(module, call) for call in calls]
        expected = {name: torch.cat([one[name] for one in found]).float().numpy() for name in part.outputs}
        cases.append(Case(_random(rows, h, w), inputs, expected, is_random=True))
    return part, _flux_inputs(kind, module.config, 2, height, width)[0], cases


def _flux_inputs(kind: FluxControlNet, config: Any, rows: int, height: int, width: int) -> tuple[Tensors, list[dict[str, Any]]]:
    """Random inputs of a ControlNet of Flux for that many tokens, and a call of diffusers' class for each row. Every second image
    is turned by a right angle, unless the ControlNet reads pixels, which have one size in a call."""
    generator, pixels = torch.Generator("cpu").manual_seed(rows), flux_control.reads_pixels(config)
    sizes = [(width, height) if row % 2 and not pixels else (height, width) for row in range(rows)]
    calls = [
        kind.example(Layout(_TOKENS, (size,)), timestep / 1000, generator)
        for size, timestep in zip(sizes, _TIMESTEPS, strict=False)
    ]
    shape = (3, _PIXELS * height, _PIXELS * width) if pixels else (height * width, config.in_channels)
    own = {IMAGE: torch.randn(rows, *shape, generator=generator), SCALE: torch.tensor(_SCALES[:rows])}
    if flux_control.is_union(config):
        own[MODE] = torch.arange(rows) % config.num_mode
    inputs = token_graphs.join([kind.graph.inputs(call) for call in calls]) | own
    for row, call in enumerate(calls):
        call |= kind.control({name: value[row : row + 1] for name, value in own.items()})
    return inputs, calls


def _random(rows: int, height: int, width: int) -> str:
    return f"random, batch {rows}, {height} x {width}"


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
    inputs of `case`, of several rows, the first one without residuals, and without image prompts if the denoiser takes them.

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

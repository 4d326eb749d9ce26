"""The inputs that a call of the control graph lacks: residuals if no ControlNet applies, image prompts if no row has one."""

from collections.abc import Mapping

import torch

from img2img_server.bundle.controls import MID, SAMPLES, is_residual
from img2img_server.bundle.image_prompts import BIAS, STATES


def needs_control_graph(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a denoiser's call with these inputs is one of the control graph."""
    return MID in tensors or SAMPLES in tensors or STATES in tensors


def missing_inputs(
    types: Mapping[str, torch.dtype], widths: Mapping[str, int], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Zeros for the inputs of a control graph that a call with `tensors` lacks; `types` and `widths` are its `input_types` and
    `widths`.

    They add exactly 0. Residuals have one place, [rows, C, 1, 1], which is added to all; image prompts have one adapter with one
    token.
    """
    first = next(iter(tensors.values()))
    ends: dict[str, tuple[int, ...]] = {name: (width, 1, 1) for name, width in widths.items() if is_residual(name)}
    if STATES in types:
        ends |= {STATES: (1, 1, widths[STATES]), BIAS: (1, 1)}
    return {
        name: first.new_zeros(len(first), *end, dtype=types[name])
        for name, end in ends.items()
        if name in types and name not in tensors
    }

"""Comparisons of a denoiser's light graph with PyTorch."""

from dataclasses import replace

import numpy as np
import torch
from img2img_server.bundle.speedups import FEATURES

from img2img_export.convert.parts import Part
from img2img_export.verify.parity import Case


def light_cases(part: Part, cases: list[Case]) -> tuple[Part, list[Case]]:
    """The light graph's description and its comparisons: on features of the same inputs, its output is the whole graph's."""
    made = []
    for case in cases:
        expected = {name: value for name, value in case.expected.items() if name != FEATURES}
        features = torch.from_numpy(np.ascontiguousarray(case.expected[FEATURES]))
        made.append(replace(case, inputs={**case.inputs, FEATURES: features}, expected=expected))
    outputs = {name: axes for name, axes in part.outputs.items() if name != FEATURES}
    return replace(part, inputs={**part.inputs, FEATURES: part.outputs[FEATURES]}, outputs=outputs), made

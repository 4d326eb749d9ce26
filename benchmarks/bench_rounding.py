"""Errors of a UNet in bfloat16, with the timestep and its angles in float32 and in bfloat16.

Emulated in PyTorch, so it runs on any CPU: weights and layers are always in bfloat16, and only the computation of the timestep
embedding differs. The UNet has Stable Diffusion 1.5's first width, half of its others, and random weights.
"""

import argparse
import copy
import math
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table

_CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (160, 320, 320, 320),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    parser.add_argument("--timesteps", type=int, nargs="+", default=[21, 101, 261, 501, 741, 981], metavar="T")


@torch.inference_mode()
def run(arguments: argparse.Namespace) -> int:
    """Prints a table: relative L2 errors against float32, by timestep."""
    torch.manual_seed(0)
    exact = UNet2DConditionModel(**_CONFIG).eval()
    rounded = copy.deepcopy(exact).bfloat16()
    waves = rounded.time_proj.forward
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 768)
    ways = {
        "both in float32 (PyTorch)": waves,
        "angle in bfloat16": lambda timestep: _waves(exact, timestep),
        "both in bfloat16": lambda timestep: _waves(exact, timestep.bfloat16().float()),
    }
    table = Table("timestep", *ways, title="error of a UNet in bfloat16, relative L2")
    for timestep in arguments.timesteps:
        times = torch.full((2,), float(timestep))
        expected = exact(sample, times, text).sample
        row = []
        for way in ways.values():
            rounded.time_proj.forward = way
            found = rounded(sample.bfloat16(), times, text.bfloat16()).sample.float()
            row.append(f"{float((found - expected).norm() / expected.norm()):.2%}")
        table.add_row(str(timestep), *row)
    Console(width=120).print(table)
    return 0


def _waves(unet: UNet2DConditionModel, timestep: torch.Tensor) -> torch.Tensor:
    """diffusers' sinusoidal embedding [B, C] with its angles rounded to bfloat16."""
    half = unet.time_proj.num_channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half)
    angles = (timestep[:, None] * frequencies).bfloat16().float()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)

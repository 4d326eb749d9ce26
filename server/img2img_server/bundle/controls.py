"""The names in the graphs of ControlNets, and in the control graph: a second graph of a UNet, which adds their residuals.

A ControlNet's outputs have the names of the control graph's inputs: a residual for each skip connection of the UNet, and one for
its middle block. Standard library only: the exporter imports this module, too.
"""

CONTROL_NAME = "control.onnx"
"""File name of the control graph, beside the plain graph, whose weights file it shares."""
CONTROL_LORA_NAME = "control_lora.onnx"
"""File name of the control graph in which each row may have another LoRA, too (adapters.py)."""

FAMILY = "controlnet"
"""The family of bundles of ControlNets, and the component with their graph."""
CONTROL_CLASS = "ControlNetModel"
"""The class of the ControlNets that become bundles: those of Stable Diffusion 1, 2 and XL."""

IMAGE, SCALE = "controlnet_cond", "conditioning_scale"
"""A ControlNet's inputs for the control images [rows, 3, H, W], from 0 to 1, and for the scales [rows] of its residuals."""

DOWN, MID = "down_block_additional_residuals", "mid_block_additional_residual"
"""diffusers' names of the UNet's parameters."""


def residual_names(count: int) -> list[str]:
    """The names of `count` residuals, of which the last is the middle block's."""
    return [*(f"{DOWN}.{index}" for index in range(count - 1)), MID]


def is_residual(name: str) -> bool:
    """Whether an input or output of a graph is a residual."""
    return name == MID or name.startswith(f"{DOWN}.")

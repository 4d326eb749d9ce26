"""The names in the graphs of ControlNets, and in the control graph: a second graph of a UNet or of Flux's transformer, which adds
their residuals.

A ControlNet's outputs have the names of the control graph's inputs: for a UNet a residual for each skip connection, and one for
its middle block; for Flux's transformer the samples of blocks and of single blocks. Standard library only: the exporter imports
this module, too.
"""

CONTROL_NAME = "control.onnx"
"""File name of the control graph, beside the plain graph, whose weights file it shares."""
CONTROL_LORA_NAME = "control_lora.onnx"
"""File name of the control graph in which each row may have another LoRA, too (adapters.py)."""

FAMILY = "controlnet"
"""The family of bundles of ControlNets, and the component with their graph."""
CONTROL_CLASS, UNION_CLASS = "ControlNetModel", "ControlNetUnionModel"
"""Classes of ControlNets of Stable Diffusion 1, 2 and XL. A union reads images of several kinds."""

FLUX_CLASS = "FluxControlNetModel"
"""The class of Flux's ControlNets, unions too."""
CLASSES = (CONTROL_CLASS, UNION_CLASS, FLUX_CLASS)
"""The classes of ControlNets that become bundles."""

IMAGE, SCALE = "controlnet_cond", "conditioning_scale"
"""A ControlNet's inputs for the control images [rows, 3, H, W], from 0 to 1, and for the scales [rows] of its residuals.
ControlNets of Flux take images from -1 to 1, or their packed latents [rows, N, C]."""
MODE = "control_mode"
"""A union's input for the kinds [rows] of the control images, integers from 0."""

DOWN, MID = "down_block_additional_residuals", "mid_block_additional_residual"
"""diffusers' names of the UNet's parameters."""

SAMPLES, SINGLES = "controlnet_block_samples", "controlnet_single_block_samples"
"""diffusers' names of the parameters of Flux's transformer: as inputs of its control graph, and outputs of a ControlNet, samples
[rows, K, N, D], which are added after blocks and after single blocks. diffusers lets K be smaller than the number of blocks."""
SAMPLE_OF, SINGLE_OF = "controlnet_block_index", "controlnet_single_block_index"
"""The control graph's inputs [rows, L] with the index of each block's sample, equal in all rows."""


def residual_names(count: int) -> list[str]:
    """The names of `count` residuals, of which the last is the middle block's."""
    return [*(f"{DOWN}.{index}" for index in range(count - 1)), MID]


def is_residual(name: str) -> bool:
    """Whether an input or output of a graph is a residual."""
    return name == MID or name.startswith(f"{DOWN}.")

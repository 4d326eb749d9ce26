"""A text encoder that sees images (Qwen2.5-VL) as two graphs: its vision tower, called for each image, and its language model.

transformers' tower takes sizes as numbers, and attends to one window after the other. The graph takes the places of patches as
tensors: rotary tables, and the patches of each window.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from img2img_server.bundle.component_config import window_side
from img2img_server.runtime.onnx.modules import Graph, OnnxTextEncoder

TOWER = "text_encoder_vision"
"""The graph of the vision tower: its folder."""
FEATURES = "image_features"
"""The tower's output [M, D], and the language model's input: what its image tokens are, in their order."""

Tensors = dict[str, torch.Tensor]


def places(config: Mapping[str, Any], height: int, width: int) -> Tensors:
    """The tower's inputs for an image of height x width patches, apart from `pixel_values` [N, P]; `config` is the tower's.

    Patches are in the order of transformers' image processor: those of a token follow each other. `rotary` [N, 2, head / 2] has
    the cosines and sines of their rows and columns, `windows` [W, S] the patches of each window, `window_mask` [W, S] which of
    these there are, and `slots` [N] where each patch is among them.
    """
    merge, side = config["spatial_merge_size"], window_side(config)
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"))
    grid = grid.reshape(2, height // merge, merge, width // merge, merge)
    rows, columns = grid.transpose(0, 1, 3, 2, 4).reshape(2, -1)
    window = rows // side * -(-width // side) + columns // side
    order, counts = np.argsort(window, kind="stable"), np.bincount(window)
    slots = np.empty_like(order)
    slots[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts) + window[order] * side**2
    patches, mask = np.zeros(len(counts) * side**2, np.int64), np.zeros(len(counts) * side**2, bool)
    patches[slots], mask[slots] = np.arange(len(order)), True
    half = config["hidden_size"] // config["num_heads"] // 2
    base = (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    frequencies = 1 / base ** (np.arange(0, half, 2) / half)
    angles = np.concatenate([rows[:, None] * frequencies, columns[:, None] * frequencies], 1)
    made = {
        "rotary": np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32),
        "windows": patches.reshape(len(counts), -1),
        "window_mask": mask.reshape(len(counts), -1),
        "slots": slots,
    }
    return {name: torch.from_numpy(value) for name, value in made.items()}


class OnnxSeeingTextEncoder(OnnxTextEncoder):
    """A text encoder that also takes images, as patches [N, P] of all images and the sizes of their grids [images, 3]. Raises
    BundleError if the configuration of the tower does not fit its graph."""

    def __init__(self, graph: Graph, tower: Graph, *arguments: Any) -> None:
        super().__init__(graph, *arguments)
        self._tower = tower
        self._vision = vision = self.config.part("vision_config")
        patch, numbers, half = vision["patch_size"], tower.widths["pixel_values"], tower.widths["rotary"]
        if not isinstance(patch, int) or numbers % patch**2:
            raise vision.problem("patch_size", f"is {patch}, and the graph's patches have {numbers} numbers")
        heads = vision["num_heads"]
        if not isinstance(heads, int) or vision["hidden_size"] // heads // 2 != half:
            text = f"is {vision['hidden_size']} and 'num_heads' is {heads}"
            raise vision.problem("hidden_size", f"{text}, but the graph's heads have {2 * half} channels")
        if window_side(vision) ** 2 != tower.widths["windows"]:
            text = f"is {vision['window_size']} and 'spatial_merge_size' is {vision['spatial_merge_size']}"
            raise vision.problem("window_size", f"{text}, but the graph's windows have {tower.widths['windows']} patches")
        if vision.get("rope_parameters"):
            vision.part("rope_parameters")

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        use_cache: bool = False,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
    ) -> Any:
        """Encodes tokens, as transformers' ModelOutput."""
        from transformers.utils import ModelOutput

        features = input_ids.new_zeros(1, self._graph.widths[FEATURES], dtype=torch.float32)
        if pixel_values is not None and image_grid_thw is not None:
            features = self.see(pixel_values, image_grid_thw)
        return ModelOutput(**self.outputs(input_ids, attention_mask, **{FEATURES: features}))

    def see(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """The features [M, D] of images."""
        found: list[torch.Tensor] = []
        grids = [(int(height), int(width)) for _, height, width in image_grid_thw.tolist()]
        patches = torch.split(pixel_values, [height * width for height, width in grids])
        for own, grid in zip(patches, grids, strict=True):
            inputs = {name: value.to(own.device) for name, value in places(self._vision, *grid).items()}
            found += self._tower(pixel_values=own, **inputs).values()
        return torch.cat(found)

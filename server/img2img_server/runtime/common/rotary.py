"""Positions of tokens in the transformers of Flux, FLUX.2, Qwen-Image and Z-Image, and their rotary tables. NumPy only.

A transformer's sequence is the text's tokens, then the image's, then those of the reference images. Sizes are (height, width) in
tokens. Each function follows the embedding of diffusers' class (`FluxPosEmbed`, `Flux2PosEmbed`, `QwenEmbedRope`, `RopeEmbedder`)
and how its pipelines number the tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Size = tuple[int, int]
"""Height and width in tokens."""

Positions = np.ndarray
"""Integers [tokens, axes]."""

Z_MULTIPLE = 32
"""Z-Image fills the text's and the image's tokens up to a multiple of this with learned pad tokens, which are attended to."""


@dataclass(frozen=True, slots=True)
class Rotary:
    """The rotary embedding of a family: `theta`, and the types in which diffusers computes frequencies and angles, which show in
    the fifth digit a thousand tokens on."""

    theta: float
    frequency: Any
    angle: Any

    def table(self, positions: Positions, dims: Sequence[int]) -> np.ndarray:
        """Cosines and sines [tokens, 2, sum(dims) / 2], float32. `dims` are the channels of a head for each axis."""
        scales = [
            (1 / self.theta ** (np.arange(0, width, 2, dtype=self.frequency) / self.frequency(width))).astype(self.frequency)
            for width in dims
        ]
        angles = [positions[:, axis, None].astype(self.frequency) * scale for axis, scale in enumerate(scales)]
        joined = np.concatenate(angles, axis=1).astype(self.angle)
        return np.stack([np.cos(joined), np.sin(joined)], axis=1).astype(np.float32)


FLUX = Rotary(10000.0, np.float64, np.float64)
FLUX_2 = Rotary(2000.0, np.float64, np.float64)
QWEN = Rotary(10000.0, np.float32, np.float32)
Z = Rotary(256.0, np.float64, np.float32)


def flux_positions(text: int, sizes: Sequence[Size]) -> tuple[Positions, Positions]:
    """The positions of `text` tokens and of the images' tokens: the first of `sizes` is the result's, others are references'."""
    images = [_grid([min(number, 1)], range(height), range(width)) for number, (height, width) in enumerate(sizes)]
    return np.zeros((text, 3), np.int64), np.concatenate(images)


def flux_2_positions(text: int, sizes: Sequence[Size]) -> tuple[Positions, Positions]:
    """As `flux_positions`."""
    images = [_grid([10 * number], range(height), range(width), [0]) for number, (height, width) in enumerate(sizes)]
    return _grid([0], [0], [0], range(text)), np.concatenate(images)


def qwen_positions(text: int, sizes: Sequence[Size]) -> tuple[Positions, Positions]:
    """As `flux_positions`. Positions count from the middle of each image; the text begins where the largest image ends."""
    images = [
        _grid([number], range(height // 2 - height, height // 2), range(width // 2 - width, width // 2))
        for number, (height, width) in enumerate(sizes)
    ]
    start = max(side // 2 for size in sizes for side in size)
    return np.repeat(np.arange(start, start + text)[:, None], 3, axis=1), np.concatenate(images)


def longcat_positions(text: int, sizes: Sequence[Size]) -> tuple[Positions, Positions]:
    """As `flux_positions`. Both axes of all images begin where the text ends."""
    images = [
        _grid([min(number, 1) + 1], range(text, text + height), range(text, text + width))
        for number, (height, width) in enumerate(sizes)
    ]
    return np.outer(np.arange(text), [0, 1, 1]), np.concatenate(images)


def z_positions(text: int, size: Size) -> tuple[Positions, Positions]:
    """The positions of a text and an image, each filled up to a multiple of Z_MULTIPLE."""
    full = text + -text % Z_MULTIPLE
    image = _grid([full + 1], range(size[0]), range(size[1]))
    return _grid(range(1, full + 1), [0], [0]), np.pad(image, ((0, -len(image) % Z_MULTIPLE), (0, 0)))


def _grid(*axes: Iterable[int]) -> Positions:
    return np.stack(np.meshgrid(*map(list, axes), indexing="ij"), -1).reshape(-1, len(axes)).astype(np.int64)

"""The watercolor style: posters as washes on white paper, with dark rims, pale colors and an unpainted border."""

import numpy as np
from augmentation import fractal_noise
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates

Pixels = NDArray[np.uint8]

PAPER = np.array([0.985, 0.975, 0.945], np.float32)
"""The color of unpainted paper, sRGB in 0..1."""


def paint_watercolor(poster: Pixels, random: np.random.Generator) -> Pixels:
    """Paint a poster (H x W x 3 in 0..255) in watercolors; lengths are fractions of its height."""
    height, width = poster.shape[:2]
    wobble = [fractal_noise(random, height, width) * height * 0.004 for _ in range(2)]
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    where = rows + wobble[0], columns + wobble[1]
    color = (poster / 255).astype(np.float32)
    color = np.stack([map_coordinates(color[..., band], where, order=1, mode="nearest") for band in range(3)], axis=2)
    washed = np.stack([gaussian_filter(color[..., band], height * 0.006) for band in range(3)], axis=2)
    rim = np.abs(washed - color).mean(axis=2, keepdims=True)
    pools = 1 + 0.10 * fractal_noise(random, height, width)[..., None]
    pigment = np.clip((PAPER - washed) * 0.78 * pools + 0.9 * gaussian_filter(rim, (height * 0.003, height * 0.003, 0)), 0, 1)
    inset = np.minimum(np.minimum(rows, height - 1 - rows), np.minimum(columns, width - 1 - columns)) / height
    brush = np.clip((inset - 0.045 - 0.016 * fractal_noise(random, height, width)) * 40, 0, 1)[..., None]
    painted = np.clip(PAPER - pigment * brush, 0, 1)
    pixels: Pixels = np.round(painted * 255).astype(np.uint8)
    return pixels

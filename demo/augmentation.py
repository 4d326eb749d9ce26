"""Sources that look less like the generator: its posters with what photographs and scans have."""

import numpy as np
from PIL import Image, ImageFilter
from posters import Floats


def fractal_noise(random: np.random.Generator, height: int, width: int) -> Floats:
    """Fractal noise around zero, height x width: the texture of grass, leaves and stone in photographs, or of paper and water."""
    total = np.zeros((height, width), np.float32)
    for cells in (8, 16, 32, 64):
        grid = random.standard_normal((cells, cells)).astype(np.float32)
        octave = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(octave, dtype=np.float32) / np.sqrt(cells)
    return total


def augment(image: Floats, random: np.random.Generator) -> Floats:
    """Make a source look less like the generator: color cast, contrast, texture, blur and sensor noise (0..1)."""
    height, width = image.shape[:2]
    out = (image - 0.5) * random.uniform(0.7, 1.2) + 0.5 + random.uniform(-0.1, 0.1)
    out = out * random.uniform(0.88, 1.12, 3)
    grey = out.mean(axis=2, keepdims=True)
    out = grey + (out - grey) * random.uniform(0.4, 1.3)
    if random.random() < 0.6:
        ground = np.clip((np.arange(height) / height - 0.45) * 8, 0.15, 1)[:, None, None]
        texture = fractal_noise(random, height, width)[..., None]
        out = out * (1 + texture * ground * random.uniform(0.05, 0.35))
    if random.random() < 0.4:
        sharp = Image.fromarray(np.round(np.clip(out, 0, 1) * 255).astype(np.uint8))
        blurred = sharp.filter(ImageFilter.GaussianBlur(random.uniform(0.4, 1.6) * width / 128))
        out = np.asarray(blurred, dtype=np.float32) / 255
    out = out + random.normal(0, random.uniform(0, 0.03), image.shape)
    return np.clip(out, 0, 1).astype(np.float32)

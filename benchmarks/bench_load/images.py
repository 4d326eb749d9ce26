"""Makes the source images of jobs, and compares results."""

import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from bench_load.workloads import Source

IMAGES = Path(__file__).resolve().parents[2] / "demo" / "images"
NOISE = 6.0
"""Standard deviation of the noise that makes an image unique, of 255."""


@functools.lru_cache(maxsize=1024)
def render(source: Source) -> bytes:
    """The source image as a PNG file."""
    image = Image.open(IMAGES / source.name).convert("RGB")
    if source.cropped:
        width, height = image.size
        image = image.crop((width // 8, height // 8, width - width // 8, height - height // 8))
    if source.flipped:
        image = ImageOps.mirror(image)
    image = image.resize(source.size, Image.Resampling.LANCZOS)
    if source.noise_seed is not None:
        noise = np.random.default_rng(source.noise_seed).normal(0, NOISE, (*image.size[::-1], 3))
        image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def largest_difference(one: bytes, other: bytes) -> int:
    """The largest difference of any channel of any pixel, of 255; 256 if the sizes differ."""
    left, right = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.int16) for data in (one, other))
    return int(np.abs(left - right).max()) if left.shape == right.shape else 256

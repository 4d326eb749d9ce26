"""The training images: many layouts, each painted for several captions, plus an augmented source."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from augmentation import augment
from captions import Scene
from landscapes import TRAINING_LAYOUTS, build_geometry, draw_layout, paint
from numpy.typing import NDArray
from palette import SEASONS, TIMES

Pixels = NDArray[np.uint8]
MOODS = [(time, season) for time in TIMES for season in SEASONS]


@dataclass(frozen=True, slots=True)
class ImageSet:
    """A data set: N x H x W x 3 pixels in 0..255 and the scene of each image; `per_layout` successive images share a layout.

    The first of each group is the layout's source (noon, summer), the second the same with augmentation.
    """

    pixels: Pixels
    scenes: list[Scene]
    per_layout: int

    def first_layouts(self, count: int) -> "ImageSet":
        """The images of the first `count` layouts."""
        end = count * self.per_layout
        return ImageSet(self.pixels[:end], self.scenes[:end], self.per_layout)


def _one_layout(seed: int, per_layout: int, size: int) -> tuple[Pixels, list[Scene]]:
    layout = draw_layout(seed)
    geometry = build_geometry(layout, size, size)
    random = np.random.default_rng((seed, 1))
    chosen = [MOODS[index] for index in random.permutation(len(MOODS))[: per_layout - 2]]
    moods = [("noon", "summer"), ("noon", "summer"), *chosen]
    images = [paint(geometry, time, season) for time, season in moods]
    images[1] = augment(images[1], random)
    scenes = [Scene(layout.kind, layout.lake, layout.trees, time, season) for time, season in moods]
    return np.round(np.stack(images) * 255).astype(np.uint8), scenes


def _many_layouts(task: tuple[list[int], int, int]) -> tuple[Pixels, list[Scene]]:
    seeds, per_layout, size = task
    built = [_one_layout(seed, per_layout, size) for seed in seeds]
    return np.concatenate([pixels for pixels, _ in built]), [scene for _, scenes in built for scene in scenes]


def _chunks(seeds: list[int], length: int) -> Iterator[list[int]]:
    for start in range(0, len(seeds), length):
        yield seeds[start : start + length]


def make_images(layout_count: int, per_layout: int, size: int = 128, workers: int = 2) -> ImageSet:
    """Render `per_layout` images of each of the first training layouts, in the same order for any worker count."""
    seeds = list(TRAINING_LAYOUTS[:layout_count])
    tasks = [(chunk, per_layout, size) for chunk in _chunks(seeds, 50)]
    with ProcessPoolExecutor(workers) as pool:
        results = list(pool.map(_many_layouts, tasks))
    scenes = [scene for _, scenes in results for scene in scenes]
    return ImageSet(np.concatenate([pixels for pixels, _ in results]), scenes, per_layout)

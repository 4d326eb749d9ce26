"""The training images: many layouts, each painted in several moods, plus an augmented source."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from augmentation import augment
from numpy.typing import NDArray
from painting import paint, to_bytes
from posters import Layout, build_geometry, draw_layout
from scenes import MOODS, Scene

Pixels = NDArray[np.uint8]
TRAINING_LAYOUTS = range(0, 1_000_000)
"""Seeds for training; all other seeds are unseen."""
UNSEEN_LAYOUTS = range(1_000_000, 2_000_000)
"""Seeds for tests and sample images."""
AUGMENTED = 1
"""Index of the augmented source in a layout's group; it is never a target."""


@dataclass(frozen=True, slots=True)
class PosterSet:
    """N x H x W x 3 pixels in 0..255 and the scene of each image; `per_layout` successive images share a layout.

    The first of each group is the layout's source (noon, summer), the second the same with augmentation.
    """

    pixels: Pixels
    scenes: list[Scene]
    per_layout: int

    def first(self, layouts: int) -> "PosterSet":
        """The posters of the first `layouts` layouts."""
        end = layouts * self.per_layout
        return replace(self, pixels=self.pixels[:end], scenes=self.scenes[:end])


def scene_of(layout: Layout, time: str = "noon", season: str = "summer") -> Scene:
    """What captions say of a layout in a mood."""
    return Scene(layout.kind, layout.lake, layout.trees, time, season)


def _one_layout(seed: int, per_layout: int, size: int) -> tuple[Pixels, list[Scene]]:
    layout = draw_layout(seed)
    geometry = build_geometry(layout, size)
    random = np.random.default_rng((seed, 1))
    chosen = [MOODS[index] for index in random.permutation(len(MOODS))[: per_layout - 2]]
    moods = [("noon", "summer"), ("noon", "summer"), *chosen]
    images = [to_bytes(paint(geometry, *mood)) for mood in moods]
    augmented = augment((images[AUGMENTED] / 255).astype(np.float32), random)
    images[AUGMENTED] = np.round(augmented * 255).astype(np.uint8)
    return np.stack(images), [scene_of(layout, *mood) for mood in moods]


def _many_layouts(task: tuple[list[int], int, int]) -> tuple[Pixels, list[Scene]]:
    seeds, per_layout, size = task
    built = [_one_layout(seed, per_layout, size) for seed in seeds]
    return np.concatenate([pixels for pixels, _ in built]), [scene for _, scenes in built for scene in scenes]


def _chunks(seeds: list[int], length: int) -> Iterator[list[int]]:
    for start in range(0, len(seeds), length):
        yield seeds[start : start + length]


def make_posters(layouts: int, per_layout: int, size: int = 256, workers: int = 2) -> PosterSet:
    """Paint `per_layout` images of each of the first training layouts, in the same order for any number of workers."""
    tasks = [(chunk, per_layout, size) for chunk in _chunks(list(TRAINING_LAYOUTS[:layouts]), 50)]
    with ProcessPoolExecutor(workers) as pool:
        results = list(pool.map(_many_layouts, tasks))
    scenes = [scene for _, scenes in results for scene in scenes]
    return PosterSet(np.concatenate([pixels for pixels, _ in results]), scenes, per_layout)


def unseen_posters(layouts: int, seed: int = 2, size: int = 256) -> Pixels:
    """One image of each of the first unseen layouts, in a mood that is drawn for it: N x H x W x 3."""
    random = np.random.default_rng(seed)
    moods = [MOODS[index] for index in random.integers(0, len(MOODS), layouts)]
    geometries = [build_geometry(draw_layout(layout), size) for layout in UNSEEN_LAYOUTS[:layouts]]
    return np.stack([to_bytes(paint(geometry, *mood)) for geometry, mood in zip(geometries, moods, strict=True)])

"""How well a model follows captions, measured against the generator's own posters of the same unseen layouts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from painting import paint
from PIL import Image
from posters import Geometry, build_geometry, draw_layout, outlines, regions
from posterset import UNSEEN_LAYOUTS, scene_of
from scenes import default_caption
from scipy.ndimage import gaussian_filter, sobel

Floats = NDArray[np.float32]

MOODS = {
    "noon": ("noon", "summer"),
    "sunset": ("sunset", "summer"),
    "night": ("night", "summer"),
    "winter": ("noon", "winter"),
    "autumn": ("noon", "autumn"),
    "fog": ("fog", "summer"),
}
PHRASES = {"sunset": "at sunset", "night": "at night", "winter": "in winter", "autumn": "in autumn", "fog": "on a foggy day"}
"""A mood alone; a caption says what is in the image, too."""


def warmth(color: Floats) -> float:
    """Red over the mean of green and blue."""
    return float(color[0] - (color[1] + color[2]) / 2)


def luminance(color: Floats) -> float:
    """Relative luminance (Rec. 709)."""
    return float(color @ np.array([0.2126, 0.7152, 0.0722]))


def saturation(color: Floats) -> float:
    """Distance of the largest channel to the smallest."""
    return float(color.max() - color.min())


MEASURES: dict[str, list[tuple[str, Callable[[Floats], float]]]] = {
    "sunset": [("sky", warmth), ("land", luminance)],
    "night": [("sky", luminance), ("land", luminance)],
    "winter": [("land", luminance), ("land", saturation)],
    "autumn": [("land", warmth)],
    "fog": [("sky", saturation)],
}
"""What a caption changes; `follows` asks for half of the change in the generator's own poster, if that is 0.03 or more."""


@dataclass(frozen=True, slots=True)
class Case:
    """One unseen layout: its masks, and the generator's posters of it in each mood, H x W x 3 in 0..1."""

    geometry: Geometry
    masks: dict[str, NDArray[np.bool_]]
    painted: dict[str, Floats]

    @property
    def source(self) -> Floats:
        """The poster at noon in summer."""
        return self.painted["noon"]

    def caption(self, mood: str) -> str:
        """What the poster is in a mood: "A beautiful landscape with desert dunes and a lake at sunset"."""
        return default_caption(scene_of(self.geometry.layout, *MOODS[mood]))

    def color(self, image: Floats, region: str) -> Floats:
        """Mean color of a region of an image."""
        mean: Floats = image[self.masks[region]].mean(axis=0)
        return mean

    def follows(self, image: Floats, mood: str) -> bool:
        """Whether every measure of a mood moved from the source at least half as far as in the generator's poster."""
        for region, measure in MEASURES[mood]:
            before = measure(self.color(self.source, region))
            wanted = measure(self.color(self.painted[mood], region)) - before
            if abs(wanted) >= 0.03 and (measure(self.color(image, region)) - before) / wanted < 0.5:
                return False
        return True

    def nearest_mood(self, image: Floats) -> str:
        """The mood whose poster of this layout has the nearest colors of sky and land."""

        def distance(mood: str) -> float:
            gaps = [self.color(image, region) - self.color(self.painted[mood], region) for region in ("sky", "land")]
            return float(np.linalg.norm(gaps))

        return min(self.painted, key=distance)


def make_cases(count: int, first: int = 100, size: int = 256) -> list[Case]:
    """Cases of unseen layouts."""
    cases = []
    for seed in UNSEEN_LAYOUTS[first : first + count]:
        geometry = build_geometry(draw_layout(seed), size)
        painted = {name: paint(geometry, *mood).transpose(1, 2, 0).astype(np.float32) for name, mood in MOODS.items()}
        cases.append(Case(geometry, regions(geometry), painted))
    return cases


def edges(image: Floats) -> Floats:
    """Edge strength in the rows around the horizon, where the ridge line is; centered, of unit length."""
    grey = gaussian_filter(image @ np.array([0.2126, 0.7152, 0.0722], np.float32), len(image) / 128)
    return _centered(np.hypot(sobel(grey, 0), sobel(grey, 1))[int(0.1 * len(grey)) : int(0.65 * len(grey))])


def keeps_ridge(image: Floats, cases: list[Case], index: int) -> bool:
    """Whether an image made from the source of case `index` has edges nearer to that source's than to any other case's."""
    own = edges(image)
    likeness = [float(own @ edges(case.source)) for case in cases]
    return int(np.argmax(likeness)) == index


def drawn_outlines(image: Floats, cases: list[Case]) -> int:
    """Index of the case whose outlines are most like the edges of an image."""
    grey = gaussian_filter(image @ np.array([0.2126, 0.7152, 0.0722], np.float32), len(image) / 170)
    strength = _centered(np.hypot(sobel(grey, 0), sobel(grey, 1)))
    lines = (gaussian_filter(outlines(case.geometry).astype(np.float32), len(image) / 128) for case in cases)
    return int(np.argmax([float(strength @ _centered(line)) for line in lines]))


def _centered(values: Floats) -> Floats:
    """The image as a vector, with a mean of 0 and a length of 1."""
    centered = (values - values.mean()).ravel()
    unit: Floats = centered / np.linalg.norm(centered)
    return unit


def transform(
    pipeline: DiffusionPipeline, cases: list[Case], prompts: list[str], strength: float, batch: int = 5, **lists: list[Any]
) -> list[Floats]:
    """Every case's source under its prompt, with the service's default steps and guidance and a seed per case. `lists` are
    further arguments of the pipeline, with an item for each case."""
    images: list[Floats] = []
    for start in range(0, len(cases), batch):
        chosen = slice(start, start + batch)
        outputs = pipeline(
            prompt=prompts[chosen],
            image=[Image.fromarray(np.round(case.source * 255).astype(np.uint8)) for case in cases[chosen]],
            strength=strength,
            num_inference_steps=25,
            guidance_scale=7.5,
            generator=[torch.Generator().manual_seed(index) for index in range(len(cases))[chosen]],
            output_type="np",
            **{name: items[chosen] for name, items in lists.items()},
        ).images
        images += list(outputs.astype(np.float32))
    return images

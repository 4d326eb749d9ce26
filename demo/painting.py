"""Colors of generated posters: `paint` gives the masks of a layout the light of a time of day and the ground of a season.

Arrays are planar (3 x H x W), float32 in 0..1.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from posters import RISE, Floats, Geometry, Trees, build_geometry, draw_layout, edge

Color = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class TimeOfDay:
    """How a time of day (or fog) lights a scene."""

    zenith: Color
    middle: Color
    horizon: Color
    light: Color
    haze: Color
    veil: float
    sun: Color
    sun_strength: float
    glow: float
    cloud: Color
    cloud_strength: float
    night: bool = False


@dataclass(frozen=True, slots=True)
class Season:
    """What a season puts on the ground; `snow` is the share of a mountain's height that stays bare."""

    ground: Color
    hill: Color
    rock: Color
    sand: Color
    conifer: Color
    broadleaf: tuple[Color, Color]
    snow: float
    ice: float = 0.0


TIMES = {
    "noon": TimeOfDay(
        (0.20, 0.53, 0.86),
        (0.47, 0.75, 0.93),
        (0.84, 0.94, 0.96),
        (1, 1, 1),
        (0.70, 0.86, 0.95),
        0.50,
        (1, 0.92, 0.58),
        1.0,
        0.55,
        (1, 1, 1),
        0.95,
    ),
    "sunset": TimeOfDay(
        (0.25, 0.16, 0.44),
        (0.84, 0.30, 0.42),
        (1.0, 0.74, 0.40),
        (0.80, 0.47, 0.50),
        (0.96, 0.50, 0.43),
        0.55,
        (1, 0.90, 0.60),
        1.0,
        0.75,
        (0.98, 0.56, 0.50),
        0.85,
    ),
    "sunrise": TimeOfDay(
        (0.42, 0.62, 0.85),
        (0.86, 0.74, 0.84),
        (1.0, 0.88, 0.72),
        (0.95, 0.78, 0.80),
        (0.99, 0.80, 0.76),
        0.60,
        (1, 0.97, 0.84),
        1.0,
        0.75,
        (1, 0.87, 0.86),
        0.9,
    ),
    "night": TimeOfDay(
        (0.03, 0.05, 0.18),
        (0.08, 0.13, 0.34),
        (0.22, 0.32, 0.57),
        (0.42, 0.52, 0.76),
        (0.18, 0.27, 0.53),
        0.50,
        (0.98, 0.95, 0.82),
        1.0,
        0.20,
        (0.17, 0.23, 0.45),
        0.9,
        night=True,
    ),
    "fog": TimeOfDay(
        (0.72, 0.77, 0.81),
        (0.79, 0.83, 0.86),
        (0.89, 0.91, 0.91),
        (0.80, 0.85, 0.87),
        (0.87, 0.90, 0.91),
        0.86,
        (1, 0.99, 0.95),
        0.55,
        0.25,
        (0.85, 0.88, 0.90),
        0.7,
    ),
}
SEASONS = {
    "summer": Season(
        (0.45, 0.68, 0.29),
        (0.25, 0.52, 0.36),
        (0.36, 0.42, 0.60),
        (0.95, 0.76, 0.47),
        (0.08, 0.33, 0.29),
        ((0.19, 0.46, 0.22), (0.33, 0.57, 0.22)),
        0.58,
    ),
    "winter": Season(
        (0.92, 0.96, 1.0),
        (0.62, 0.75, 0.89),
        (0.45, 0.53, 0.69),
        (0.90, 0.90, 0.92),
        (0.16, 0.34, 0.42),
        ((0.70, 0.79, 0.89), (0.80, 0.86, 0.93)),
        0.22,
        0.75,
    ),
    "autumn": Season(
        (0.88, 0.62, 0.25),
        (0.72, 0.40, 0.23),
        (0.50, 0.43, 0.52),
        (0.91, 0.62, 0.36),
        (0.20, 0.36, 0.25),
        ((0.85, 0.33, 0.13), (0.96, 0.66, 0.16)),
        0.64,
    ),
    "spring": Season(
        (0.62, 0.80, 0.38),
        (0.40, 0.68, 0.42),
        (0.45, 0.50, 0.64),
        (0.96, 0.82, 0.56),
        (0.14, 0.42, 0.31),
        ((0.95, 0.60, 0.72), (0.98, 0.77, 0.82)),
        0.48,
    ),
}
SNOW: Color = (0.96, 0.98, 1.0)
SHADOW: Color = (0.72, 0.72, 0.84)
WATER: Color = (0.14, 0.42, 0.58)
TRUNK: Color = (0.30, 0.20, 0.17)


def _vector(color: Color) -> Floats:
    return np.array(color, np.float32).reshape(3, 1, 1)


def _blend(first: Floats, second: Floats, share: float) -> Floats:
    return first + (second - first) * np.float32(share)


def _over(image: Floats, color: Floats, share: Floats) -> None:
    image += (color - image) * share


def _paint_sky(image: Floats, geometry: Geometry, light: TimeOfDay) -> None:
    ramp = geometry.sky[None, :, None]
    zenith, middle, horizon = _vector(light.zenith), _vector(light.middle), _vector(light.horizon)
    half = np.float32(0.55)
    rows = np.where(
        ramp < half, zenith + (middle - zenith) * (ramp / half), middle + (horizon - middle) * ((ramp - half) / (1 - half))
    )
    image[:] = rows
    if light.night:
        _over(image, _vector((0.95, 0.96, 1.0)), geometry.stars)
    _over(image, _vector(light.sun), geometry.rings * np.float32(light.glow))
    _over(image, _vector(light.sun), (geometry.crescent if light.night else geometry.disc) * np.float32(light.sun_strength))
    tint = _vector(light.cloud) + (_vector(light.horizon) - _vector(light.cloud)) * (geometry.cloud_low * np.float32(0.55))
    _over(image, tint, geometry.clouds * np.float32(light.cloud_strength))


def _paint_ranges(image: Floats, geometry: Geometry, light: TimeOfDay, look: Season, winter: bool) -> None:
    kind, shine, haze = geometry.layout.kind, _vector(light.light), _vector(light.haze)
    for index, part in enumerate(geometry.ranges):
        near = index / len(geometry.ranges)
        base = {
            "mountains": _blend(_vector(look.rock), _vector(look.hill), near * 1.2),
            "hills": _blend(_vector(look.hill), _vector(look.ground), near * 0.8),
            "dunes": _vector(look.sand) * np.float32(1 - 0.06 * index),
            "coast": _blend(_vector(look.rock), _vector(look.hill), 0.35 + 0.6 * near),
        }[kind]
        color = base
        if kind == "mountains" and (index == 0 or winter):
            bare = look.snow if index == 0 else look.snow + 0.25
            snow = edge((part.elevation - bare - part.ragged) * geometry.size * RISE[kind])
            color = base + (_vector(SNOW) - base) * snow
        if kind in ("mountains", "dunes"):
            color = color * (1 + (_vector(SHADOW) - 1) * part.shadow)
        veil = light.veil * (1 - near) * (0.55 + 0.45 * part.down) + (light.veil - 0.45) * 0.4 * part.down
        color = color * shine
        color = color + (haze - color) * np.clip(veil, 0, 1)
        _over(image[:, part.rows], color, part.coverage)


def paint(geometry: Geometry, time: str = "noon", season: str = "summer") -> Floats:
    """Color a geometry: 3 x H x W in 0..1. Raises KeyError for an unknown time or season."""
    light, look, size = TIMES[time], SEASONS[season], geometry.size
    layout, shine, haze = geometry.layout, _vector(light.light), _vector(light.haze)
    image = np.zeros((3, size, size), np.float32)
    _paint_sky(image[:, : len(geometry.sky)], geometry, light)
    _paint_ranges(image, geometry, light, look, season == "winter")
    first = int(layout.shore * size) - 4
    down = np.linspace(0, 1, size - first, dtype=np.float32)[None, :, None]
    sandy = layout.kind in ("dunes", "coast")
    ground = _vector(look.sand if sandy else look.ground) * shine
    fog = np.float32(max(0.0, light.veil - 0.5))
    meadow = ground * (1.04 - 0.22 * down)
    meadow = meadow + (haze - meadow) * (0.16 + fog * 1.3) * (1 - down)
    below = image[:, first:]
    _over(below, meadow, geometry.ground[first:])
    if layout.lake:
        mirrored = image[:, geometry.mirror_rows[first:]]
        water = _vector(WATER) * shine
        depth = np.float32(0.20) + np.float32(0.42) * down
        surface: Floats = mirrored + (water - mirrored) * depth
        surface = surface + (_vector(SNOW) * shine - surface) * np.float32(look.ice * 0.62)
        surface = surface + (_vector(light.horizon) - surface) * (geometry.streaks[first:] * np.float32(0.5))
        _over(below, surface, geometry.water[first:])
        if layout.kind == "coast":
            _over(below, _vector(SNOW) * _blend(shine, haze, 0.3), geometry.foam[first:])
    if not sandy:
        bank = _blend(_vector(look.ground), _vector(look.hill), 0.55) * shine * np.float32(0.80 if season != "winter" else 0.95)
        _over(below, _blend(bank, haze, float(fog) * 0.3), geometry.near[first:])
    if geometry.trees is not None:
        _paint_trees(image, geometry.trees, light, look, layout.conifers, season == "winter")
    return np.clip(image, 0, 1)


def _paint_trees(image: Floats, trees: Trees, light: TimeOfDay, look: Season, conifers: bool, winter: bool) -> None:
    if conifers:
        crown = _vector(look.conifer) * (0.88 + 0.2 * trees.hue)
    else:
        first, second = _vector(look.broadleaf[0]), _vector(look.broadleaf[1])
        crown = first + (second - first) * trees.hue
    crown = crown * (0.80 + 0.36 * trees.lit)
    if winter:
        crown = crown + (_vector(SNOW) - crown) * trees.snow
    crown = crown + (_vector(TRUNK) - crown) * trees.trunk
    crown = crown * _vector(light.light)
    veil = np.clip(trees.distance * light.veil * 0.7 + max(0.0, light.veil - 0.6) * 0.6, 0, 1)
    _over(image[:, trees.rows], crown + (_vector(light.haze) - crown) * veil, trees.coverage)


def to_bytes(image: Floats) -> NDArray[np.uint8]:
    """3 x H x W in 0..1 to H x W x 3 in 0..255."""
    return (image * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)


def render(seed: int, time: str = "noon", season: str = "summer", size: int = 256) -> Image.Image:
    """Render one layout in one mood as an RGB image of `size` x `size` pixels."""
    return Image.fromarray(to_bytes(paint(build_geometry(draw_layout(seed), size), time, season)))

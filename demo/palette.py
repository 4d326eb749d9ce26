"""Colours of the generated landscapes: sky, light, ground and trees by time of day and season.

Colours are sRGB in 0..1. They are separate from the geometry, so that a layout can be painted for every caption.
"""

from dataclasses import dataclass

Colour = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class TimeOfDay:
    """How a time of day (or fog) lights a scene."""

    zenith: Colour
    horizon: Colour
    light: Colour
    sun: Colour | None
    glow: float = 0.0
    cloud: Colour = (1.0, 1.0, 1.0)
    cloud_strength: float = 0.0
    stars: float = 0.0
    fog: float = 0.0


@dataclass(frozen=True, slots=True)
class Season:
    """The colours of a season. `snow` is a fraction of a layer's height below its ridge."""

    ground: Colour
    rock: Colour
    conifer: Colour
    broadleaf: Colour
    snow: float
    dune_blend: float
    ice: float


TIMES: dict[str, TimeOfDay] = {
    "noon": TimeOfDay(
        zenith=(0.30, 0.56, 0.88),
        horizon=(0.76, 0.88, 0.97),
        light=(1.0, 1.0, 1.0),
        sun=(1.0, 0.98, 0.86),
        glow=0.75,
        cloud_strength=0.75,
    ),
    "sunset": TimeOfDay(
        zenith=(0.27, 0.18, 0.43),
        horizon=(1.0, 0.54, 0.22),
        light=(0.86, 0.58, 0.48),
        sun=(1.0, 0.82, 0.46),
        glow=0.8,
        cloud=(0.93, 0.36, 0.34),
        cloud_strength=0.6,
    ),
    "sunrise": TimeOfDay(
        zenith=(0.48, 0.60, 0.80),
        horizon=(1.0, 0.78, 0.68),
        light=(0.92, 0.78, 0.74),
        sun=(1.0, 0.93, 0.76),
        glow=0.8,
        cloud=(1.0, 0.76, 0.74),
        cloud_strength=0.6,
    ),
    "night": TimeOfDay(
        zenith=(0.02, 0.04, 0.15),
        horizon=(0.09, 0.13, 0.31),
        light=(0.20, 0.24, 0.39),
        sun=(0.93, 0.93, 0.85),
        glow=0.22,
        cloud=(0.12, 0.15, 0.28),
        cloud_strength=0.35,
        stars=0.9,
    ),
    "fog": TimeOfDay(
        zenith=(0.68, 0.71, 0.73),
        horizon=(0.80, 0.82, 0.84),
        light=(0.80, 0.82, 0.84),
        sun=None,
        cloud_strength=0.2,
        fog=0.62,
    ),
}

SEASONS: dict[str, Season] = {
    "summer": Season(
        ground=(0.26, 0.52, 0.21),
        rock=(0.38, 0.41, 0.44),
        conifer=(0.09, 0.30, 0.14),
        broadleaf=(0.16, 0.40, 0.12),
        snow=0.16,
        dune_blend=0.0,
        ice=0.0,
    ),
    "winter": Season(
        ground=(0.89, 0.92, 0.96),
        rock=(0.60, 0.64, 0.70),
        conifer=(0.55, 0.63, 0.66),
        broadleaf=(0.78, 0.82, 0.87),
        snow=0.75,
        dune_blend=0.85,
        ice=0.65,
    ),
    "autumn": Season(
        ground=(0.70, 0.42, 0.15),
        rock=(0.49, 0.37, 0.31),
        conifer=(0.36, 0.34, 0.12),
        broadleaf=(0.82, 0.34, 0.10),
        snow=0.10,
        dune_blend=0.45,
        ice=0.0,
    ),
}

SAND: Colour = (0.86, 0.69, 0.43)
SAND_ROCK: Colour = (0.80, 0.60, 0.38)
SNOW: Colour = (0.95, 0.97, 0.99)
WATER: Colour = (0.16, 0.30, 0.42)

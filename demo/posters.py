"""Layouts of generated posters: a seed gives a layout, and a layout gives masks of one size.

A poster is a flat, anti-aliased illustration of a landscape. It is made in three steps, so that a layout has the same geometry
under every caption: `draw_layout` draws all random numbers (seed -> Layout), `build_geometry` turns them into masks (Layout ->
Geometry), and `painting.paint` colors the masks (Geometry, time, season -> pixels). All edges are hard and anti-aliased by the
signed distance to them; there is no texture and no noise. Masks are in 0..1; lengths are fractions of the image's side.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter

Floats = NDArray[np.floating[Any]]

KINDS = ("mountains", "hills", "dunes", "coast")
RANGES = {"mountains": 3, "hills": 3, "dunes": 3, "coast": 2}
RISE = {"mountains": 0.42, "hills": 0.15, "dunes": 0.15, "coast": 0.15}


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything random about a scene."""

    kind: str
    lake: bool
    trees: bool
    conifers: bool
    horizon: float
    shore: float
    sun: tuple[float, float, float]
    knots: tuple[Floats, ...]
    """Per range, N x 3 of peaks and valleys in turn: place, height (0..1), skew of the peak's spine."""
    phases: Floats
    bank: tuple[float, float, float]
    near: tuple[float, float, float]
    far_trees: Floats
    near_trees: Floats
    stars: Floats
    clouds: tuple[Floats, ...]
    streaks: Floats


@dataclass(frozen=True, slots=True)
class Range:
    """One range of the backdrop: `rows` of the image, coverage and shadow there, elevation (0..1) per row, snow's edge."""

    rows: slice
    coverage: Floats
    shadow: Floats
    elevation: Floats
    ragged: Floats
    down: Floats


@dataclass(frozen=True, slots=True)
class Trees:
    """Masks of all trees, in the `rows` that have any; `distance` is how far they are in the haze."""

    rows: slice
    coverage: Floats
    lit: Floats
    hue: Floats
    trunk: Floats
    snow: Floats
    distance: Floats


@dataclass(frozen=True, slots=True)
class Geometry:
    """Masks of a layout at one size."""

    layout: Layout
    size: int
    sky: Floats
    disc: Floats
    crescent: Floats
    rings: Floats
    stars: Floats
    clouds: Floats
    cloud_low: Floats
    ranges: tuple[Range, ...]
    ground: Floats
    water: Floats
    foam: Floats
    streaks: Floats
    mirror_rows: NDArray[np.intp]
    near: Floats
    trees: Trees | None


def _knots(random: np.random.Generator, kind: str, index: int) -> Floats:
    step = 0.34 * (1 - (0.24 if kind == "mountains" else 0.18) * index)
    places: list[float] = []
    heights: list[float] = []
    x = -0.35 - random.random() * step
    while x < 1.4:
        valley = len(places) % 2 == 0
        heights.append(random.uniform(0.05, 0.38) if valley else random.uniform(0.55, 1.0))
        places.append(x)
        x += step * random.uniform(0.55, 1.2)
    return np.stack([places, heights, random.uniform(-1, 1, len(places))], 1).astype(np.float32)


def _cloud(random: np.random.Generator, horizon: float) -> Floats:
    """Discs (u, v, radius) of one cloud, which has a flat base."""
    u, v, wide = random.uniform(-0.05, 1.05), random.uniform(0.08, 0.62) * horizon, random.uniform(0.10, 0.22)
    count = int(random.integers(3, 6))
    across = np.linspace(-1, 1, count) * wide * 0.62
    radius = wide * random.uniform(0.22, 0.40, count) * (1.15 - np.abs(across) / wide)
    return np.stack([u + across, np.full(count, v), radius], 1).astype(np.float32)


def draw_layout(seed: int) -> Layout:
    """Draw a layout; the same seed gives the same one, whatever it is painted as later."""
    random = np.random.default_rng(seed)
    kind = str(random.choice(KINDS, p=[0.34, 0.26, 0.2, 0.2]))
    horizon = float(random.uniform(0.48, 0.60))
    shore = horizon if kind == "coast" else horizon + float(random.uniform(0.07, 0.11))
    lake = kind == "coast" or bool(random.random() < 0.5)
    side = float(random.choice([-1.0, 1.0]))
    count = int(random.integers(2, 7))
    foot = np.sort(random.uniform(0.80, 0.97, count))
    near_u = 0.5 + side * random.uniform(0.08, 0.50, count)
    near_trees = np.stack([near_u, foot, foot * random.uniform(0.20, 0.34, count), random.random(count)], 1)
    bunches = random.uniform(0, 1, 4)
    many = int(random.integers(10, 26))
    far_u = random.choice(bunches, many) + random.normal(0, 0.07, many)
    far_trees = np.stack([far_u, random.uniform(-0.004, 0.014, many), random.uniform(0.028, 0.060, many), random.random(many)], 1)
    return Layout(
        kind=kind,
        lake=lake,
        trees=bool(random.random() < (0.65 if kind in ("mountains", "hills") else 0.4)),
        conifers=bool(random.random() < (0.5 if kind in ("mountains", "hills") else 0.0)),
        horizon=horizon,
        shore=shore,
        sun=(float(random.uniform(0.14, 0.86)), horizon * float(random.uniform(0.22, 0.70)), float(random.uniform(0.050, 0.080))),
        knots=tuple(_knots(random, kind, index) for index in range(RANGES[kind])),
        phases=random.random((4, 4)).astype(np.float32),
        bank=(float(random.uniform(0.76, 0.90)), float(random.uniform(0.015, 0.05)), float(random.random())),
        near=(float(random.uniform(0.86, 0.95)), side, float(random.random())),
        far_trees=far_trees[np.argsort(far_trees[:, 1])].astype(np.float32),
        near_trees=near_trees.astype(np.float32),
        stars=random.random((int(random.integers(30, 60)), 3)).astype(np.float32),
        clouds=tuple(_cloud(random, horizon) for _ in range(int(random.integers(1, 5)))),
        streaks=random.random((12, 3)).astype(np.float32),
    )


def edge(distance: Floats) -> Floats:
    """Coverage of a pixel whose centre lies `distance` pixels inside of an edge."""
    covered: Floats = np.clip(distance + 0.5, 0, 1)
    return covered


def _profile(layout: Layout, index: int, u: Floats) -> tuple[Floats, Floats, Floats]:
    """Along u: height (0..1), place of the peak it belongs to, and its spine's skew."""
    knots, phases = layout.knots[index], layout.phases[index]
    place, height, skew = knots.T
    peaks = slice(1, None, 2)
    owner = np.clip(np.searchsorted(place[2::2], u), 0, len(place[peaks]) - 1)
    own, lean = place[peaks][owner], skew[peaks][owner]
    if layout.kind == "mountains":
        top = np.interp(u, place, height)
        for k, (frequency, strength) in enumerate(((7.0, 0.045), (17.0, 0.020))):
            cycle = u * frequency + phases[k]
            top = top + strength * (4 * np.abs(cycle - np.floor(cycle + 0.5)) - 1)
    elif layout.kind == "dunes":
        segment = np.clip(np.searchsorted(place, u) - 1, 0, len(place) - 2)
        share = (u - place[segment]) / (place[segment + 1] - place[segment])
        rising = segment % 2 == 0
        eased = np.where(rising, np.sin(np.clip(share, 0, 1) * np.pi / 2) ** 1.6, np.clip(share, 0, 1) ** 0.75)
        top = height[segment] + (height[segment + 1] - height[segment]) * eased
    else:
        waves = [np.sin(2 * np.pi * (f * u + p)) * a for f, p, a in zip((0.7, 1.5, 2.7), phases, (0.5, 0.3, 0.1), strict=False)]
        top = 0.5 + 0.55 * np.sum(waves, axis=0)
        if layout.kind == "coast":
            end = 0.25 + 0.35 * phases[3] - 0.12 * index
            across = u if (phases[2] < 0.5) == (index == 0) else 1 - u
            top = (top * 0.6 + 0.55) * (1 - np.clip(across / end, 0, 1) ** 3) - 0.02
    return top.astype(np.float32), own.astype(np.float32), lean.astype(np.float32)


def _build_range(layout: Layout, index: int, size: int) -> Range:
    u = (np.arange(size, dtype=np.float32) + 0.5) / size
    top, own, lean = _profile(layout, index, u)
    foot = layout.horizon + (0 if layout.kind == "coast" else 0.045 * index)
    rise = RISE[layout.kind] * (1 - (0.33 if layout.kind == "mountains" else 0.12) * index)
    if layout.kind in ("hills", "dunes"):
        foot += 0.02 * index
    ridge = foot - rise * top
    first = max(0, int(ridge.min() * size) - 1)
    last = min(size, int((foot if layout.kind == "coast" else layout.shore + 0.05) * size) + 1)
    rows = slice(first, max(last, first + 1))
    v = ((np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5) / size)[:, None]
    slope = np.gradient(ridge) * size
    depth = v - ridge
    coverage = edge(depth * size / np.sqrt(1 + slope * slope))
    if layout.kind == "coast":
        coverage *= edge((foot - v) * size)
    shadow = np.zeros_like(coverage)
    if layout.kind in ("mountains", "dunes"):
        below = np.maximum(depth, 0)
        drop = np.maximum(v - (foot - rise), 0)
        if layout.kind == "mountains":
            cycle = drop * 11 + layout.phases[index, 3]
            spine = own + 0.45 * lean * drop + 0.040 * (2 * np.abs(cycle - np.floor(cycle + 0.5)) - 0.5)
        else:
            spine = own + 0.9 * drop + 0.05 * np.sin(drop * 24 + 6.3 * layout.phases[index, 3])
        side = 1.0 if layout.sun[0] < 0.5 or layout.kind == "dunes" else -1.0
        shadow = edge(side * (u - spine) * size * 0.8) * edge(below * size)
    cycle = u * 13 + layout.phases[index, 0]
    ragged = 0.14 * (2 * np.abs(cycle - np.floor(cycle + 0.5)) - 0.5)
    cycle = u * 29 + layout.phases[index, 1]
    ragged = ragged + 0.06 * (2 * np.abs(cycle - np.floor(cycle + 0.5)) - 0.5)
    return Range(rows, coverage, shadow, (foot - v) / rise, ragged.astype(np.float32), np.clip((v - foot + rise) / rise, 0, 1))


class _Canvas:
    """Masks that small shapes are drawn into, each within its own window."""

    def __init__(self, size: int, names: tuple[str, ...]) -> None:
        self.size = size
        self.maps = {name: np.zeros((size, size), np.float32) for name in names}

    def window(self, left: float, top: float, right: float, bottom: float) -> tuple[tuple[slice, slice], Floats, Floats] | None:
        size = self.size
        x0, x1 = max(0, int(left * size) - 1), min(size, int(right * size) + 2)
        y0, y1 = max(0, int(top * size) - 1), min(size, int(bottom * size) + 2)
        if x0 >= x1 or y0 >= y1:
            return None
        u = (np.arange(x0, x1, dtype=np.float32) + 0.5) / size
        v = (np.arange(y0, y1, dtype=np.float32)[:, None] + 0.5) / size
        return (slice(y0, y1), slice(x0, x1)), u, v

    def put(self, where: tuple[slice, slice], coverage: Floats, **values: Floats | float) -> None:
        for name, value in values.items():
            part = self.maps[name][where]
            part += (value - part) * coverage
        part = self.maps["coverage"][where]
        part += (1 - part) * coverage


def _conifer(canvas: _Canvas, u0: float, foot: float, tall: float, hue: float, distance: float) -> None:
    found = canvas.window(u0 - 0.25 * tall, foot - tall, u0 + 0.25 * tall, foot)
    if found is None:
        return
    where, u, v = found
    pixels = tall * canvas.size
    across, up = (u - u0) / tall, (foot - v) / tall
    tiers = 3 if pixels > 16 else 1
    inside = np.full(np.broadcast_shapes(across.shape, up.shape), -9, np.float32)
    snow = np.zeros_like(inside)
    for tier in range(tiers):
        low, high = (0.10, 1.0) if tiers == 1 else (0.10 + 0.26 * tier, 0.52 + 0.24 * tier)
        wide = 0.24 if tiers == 1 else 0.24 - 0.055 * tier
        body = np.minimum((high - up) / (high - low) * wide - np.abs(across), up - low)
        snow = np.where(body > 0, edge((up - low - 0.45 * (high - low)) * pixels), snow)
        inside = np.maximum(inside, body)
    trunk = np.minimum(np.minimum(0.03 - np.abs(across), 0.2 - up), up)
    crown = edge(inside * pixels)
    canvas.put(where, edge(trunk * pixels), trunk=1.0, snow=0.0, lit=0.5, hue=hue, distance=distance)
    canvas.put(where, crown, trunk=0.0, snow=snow, lit=edge(-across * pixels), hue=hue, distance=distance)


def _broadleaf(canvas: _Canvas, u0: float, foot: float, tall: float, hue: float, distance: float) -> None:
    found = canvas.window(u0 - 0.34 * tall, foot - tall, u0 + 0.34 * tall, foot)
    if found is None:
        return
    where, u, v = found
    pixels = tall * canvas.size
    across, up = (u - u0) / tall, (foot - v) / tall
    trunk = np.minimum(np.minimum(0.035 - np.abs(across), 0.6 - up), up)
    crown = np.maximum(
        0.27 - np.hypot(across, (up - 0.70) * 0.94),
        np.maximum(0.19 - np.hypot(across + 0.13, up - 0.52), 0.19 - np.hypot(across - 0.13, up - 0.52)),
    )
    lit = edge((0.24 - np.hypot(across + 0.07, up - 0.76)) * pixels)
    canvas.put(where, edge(trunk * pixels), trunk=1.0, snow=0.0, lit=0.5, hue=hue, distance=distance)
    canvas.put(where, edge(crown * pixels), trunk=0.0, snow=lit * 0.7, lit=lit, hue=hue, distance=distance)


def _build_trees(layout: Layout, size: int) -> Trees | None:
    if not layout.trees:
        return None
    canvas = _Canvas(size, ("coverage", "lit", "hue", "trunk", "snow", "distance"))
    draw = _conifer if layout.conifers else _broadleaf
    if layout.kind in ("mountains", "hills"):
        for u, v, tall, hue in layout.far_trees.tolist():
            draw(canvas, u, layout.shore + 0.012 + v, tall, hue, 0.45)
    for u, foot, tall, hue in layout.near_trees.tolist():
        draw(canvas, u, foot, tall, hue, 0.0)
    covered = np.flatnonzero(canvas.maps["coverage"].any(axis=1))
    rows = slice(int(covered[0]), int(covered[-1]) + 1) if len(covered) else slice(0, 0)
    maps = {name: values[rows] for name, values in canvas.maps.items()}
    return Trees(rows, **maps)


def _build_sky(layout: Layout, size: int) -> tuple[Floats, Floats, Floats, Floats, Floats, Floats, Floats]:
    high = int(np.ceil((layout.shore + 0.02) * size))
    u = (np.arange(size, dtype=np.float32) + 0.5) / size
    v = ((np.arange(high, dtype=np.float32) + 0.5) / size)[:, None]
    across, down, radius = u - layout.sun[0], v - layout.sun[1], layout.sun[2]
    distance = np.sqrt(across * across + down * down)
    disc = edge((radius - distance) * size)
    hollow = np.sqrt((across - 0.42 * radius) ** 2 + (down + 0.22 * radius) ** 2)
    crescent = disc * (1 - edge((0.86 * radius - hollow) * size))
    rings = sum(edge((radius * k - distance) * size) * a for k, a in ((1.8, 0.30), (2.9, 0.22), (4.3, 0.16)))
    rings = rings + 0.32 * np.exp(-((distance / 0.32) ** 2))
    stars = _Canvas(size, ("coverage",))
    for place, height, bright in layout.stars.tolist():
        radius_star = 0.0022 + 0.0034 * bright**3
        x, y = place, height * layout.horizon * 0.95
        found = stars.window(x - radius_star, y - radius_star, x + radius_star, y + radius_star)
        if found is not None:
            where, du, dv = found
            stars.put(where, edge((radius_star - np.hypot(du - x, dv - y)) * size) * (0.55 + 0.45 * bright))
    clouds = _Canvas(size, ("coverage", "low"))
    for discs in layout.clouds:
        left, right = (discs[:, 0] - discs[:, 2]).min(), (discs[:, 0] + discs[:, 2]).max()
        base, tall = float(discs[0, 1]), float(discs[:, 2].max())
        found = clouds.window(left, base - tall, right, base)
        if found is not None:
            where, du, dv = found
            shape = np.max([r - np.hypot(du - x, dv - y) for x, y, r in discs.tolist()], axis=0)
            clouds.put(where, edge(np.minimum(shape, base - dv) * size), low=np.clip((dv - base + tall) / tall, 0, 1))
    ramp = np.clip(v[:, 0] / layout.horizon, 0, 1)
    return ramp, disc, crescent, rings, stars.maps["coverage"][:high], clouds.maps["coverage"][:high], clouds.maps["low"][:high]


def build_geometry(layout: Layout, size: int = 256) -> Geometry:
    """Turn a layout into masks for images of one size."""
    sky = _build_sky(layout, size)
    u = (np.arange(size, dtype=np.float32) + 0.5) / size
    v = ((np.arange(size, dtype=np.float32) + 0.5) / size)[:, None]
    shore = layout.shore + (0 if layout.kind == "coast" else 0.008) * np.sin(u * 7 + 6.3 * layout.bank[2])
    ground = edge((v - shore) * size)
    low, swing, phase = layout.bank
    water, foam, streaks = np.zeros_like(ground), np.zeros_like(ground), np.zeros_like(ground)
    surface = layout.shore + (0 if layout.kind == "coast" else 0.030)
    if layout.lake:
        bank = low + swing * np.sin(u * 5.2 + 6.3 * phase) + 0.3 * swing * np.sin(u * 11 + 9 * phase)
        water = edge((v - surface) * size) * edge((bank - v) * size)
        if layout.kind == "coast":
            foam = edge((0.010 - np.abs(v - bank)) * size)
        canvas = _Canvas(size, ("coverage",))
        for place, across, wide in layout.streaks.tolist():
            y = surface + 0.015 + place * (low - surface - 0.02)
            thick, half = 0.0022 + 0.004 * place, 0.03 + 0.10 * wide
            found = canvas.window(across - half, y - thick, across + half, y + thick)
            if found is not None:
                where, du, dv = found
                reach = np.maximum(np.abs(du - across) - (half - thick), 0)
                canvas.put(where, edge((thick - np.hypot(reach, dv - y)) * size))
        streaks = canvas.maps["coverage"] * water
    top, side, phase = layout.near
    lift = 0.10 * np.clip(side * (u - 0.5) + 0.5, 0, 1) ** 1.5 + 0.012 * np.sin(u * 8 + 6.3 * phase)
    near = edge((v - top + lift) * size)
    mirror = np.clip((2 * surface * size - np.arange(size) - 1).round(), 0, size - 1).astype(np.intp)
    ranges = tuple(_build_range(layout, index, size) for index in range(RANGES[layout.kind]))
    return Geometry(layout, size, *sky, ranges, ground, water, foam, streaks, mirror, near, _build_trees(layout, size))


def regions(geometry: Geometry) -> dict[str, NDArray[np.bool_]]:
    """Masks of the sky without sun, moon and clouds, and of the land without trees and water, size x size each."""
    size = geometry.size
    covered = np.zeros((size, size), bool)
    for part in geometry.ranges:
        covered[part.rows] |= part.coverage > 0
    land = (geometry.ground > 0.99) & (geometry.water == 0)
    covered |= (geometry.ground > 0) | (geometry.water > 0)
    if geometry.trees is not None:
        covered[geometry.trees.rows] |= geometry.trees.coverage > 0
        land[geometry.trees.rows] &= geometry.trees.coverage == 0
    sky = ~covered
    sky[: len(geometry.disc)] &= (geometry.disc == 0) & (geometry.clouds == 0)
    return {"sky": sky, "land": land}


def outlines(geometry: Geometry) -> NDArray[np.uint8]:
    """White lines on black between sky, each range, ground and water, size x size in 0..255: what a ControlNet is shown."""
    size = geometry.size
    areas = np.zeros((size, size), np.uint8)
    for number, part in enumerate(geometry.ranges, start=1):
        areas[part.rows][part.coverage > 0.5] = number
    areas[geometry.ground > 0.5] = len(geometry.ranges) + 1
    areas[geometry.water > 0.5] = len(geometry.ranges) + 2
    lines = np.zeros((size, size), bool)
    lines[:-1] |= areas[1:] != areas[:-1]
    lines[:, :-1] |= areas[:, 1:] != areas[:, :-1]
    thick: NDArray[np.uint8] = maximum_filter((lines * 255).astype(np.uint8), size=max(2, size // 85))
    return thick

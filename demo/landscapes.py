"""Generated landscapes: layout seed x time of day x season -> an image.

An image is made in three steps, so that a layout has the same geometry for every caption: `draw_layout` draws all random numbers
(seed -> Layout), `build_geometry` turns them into masks of one size (Layout -> Geometry), and `paint` colours the masks
(Geometry, time, season -> pixels). Tests and the training of the UNet compare or pair images of one layout.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from palette import SAND, SAND_ROCK, SEASONS, SNOW, TIMES, WATER, Colour, TimeOfDay
from PIL import Image

Floats = NDArray[np.float32]

KINDS = ("mountains", "hills", "dunes")
TRAINING_LAYOUTS = range(0, 1_000_000)
"""Seeds for training; all other seeds are unseen."""
UNSEEN_LAYOUTS = range(1_000_000, 2_000_000)
"""Seeds for tests and sample images: disjoint from training by construction."""

_OCTAVES = 6
_RIDGE_HEIGHT = {"mountains": 0.26, "hills": 0.10, "dunes": 0.09}
_ROUGHNESS = {"mountains": 1.0, "hills": 1.9, "dunes": 2.1}


@dataclass(frozen=True, slots=True)
class Layout:
    """All random parameters of a scene, in fractions of the image's width (u) and height (v)."""

    kind: str
    lake: bool
    trees: bool
    horizon: float
    sun: tuple[float, float]
    phases: Floats
    shore: float
    lake_depth: float
    lake_wobble: float
    tree_rows: Floats
    round_trees: bool
    stars: Floats
    clouds: Floats
    texture: Floats


@dataclass(frozen=True, slots=True)
class Layer:
    """One range of the backdrop: coverage and shade per pixel, and how far below its ridge a pixel lies (0..1)."""

    coverage: Floats
    shade: Floats
    below_ridge: Floats


@dataclass(frozen=True, slots=True)
class Geometry:
    """Masks of a layout at one size; each is H x W in 0..1 unless noted."""

    layout: Layout
    sky_ramp: Floats
    sun_disc: Floats
    sun_glow: Floats
    stars: Floats
    clouds: Floats
    layers: tuple[Layer, ...]
    ground: Floats
    ground_shade: Floats
    lake: Floats
    mirror: tuple[NDArray[np.intp], NDArray[np.intp]]
    trees: Floats
    tree_shade: Floats
    ridge: Floats
    """W: the row of the skyline, in pixels."""


def draw_layout(seed: int) -> Layout:
    """Draw a layout; deterministic per seed."""
    random = np.random.default_rng(seed)
    kind = str(random.choice(KINDS, p=[0.45, 0.35, 0.2]))
    lake, trees = bool(random.random() < 0.5), bool(random.random() < 0.45)
    horizon = float(random.uniform(0.42, 0.6))
    shore = horizon + float(random.uniform(0.09, 0.15))
    count = int(random.integers(4, 12))
    rows = np.stack([random.random(count), random.uniform(0.78, 0.98, count), random.uniform(0.1, 0.2, count)], 1)
    return Layout(
        kind=kind,
        lake=lake,
        trees=trees,
        horizon=horizon,
        sun=(float(random.uniform(0.15, 0.85)), horizon * float(random.uniform(0.2, 0.62))),
        phases=random.random((3, _OCTAVES, 2)).astype(np.float32),
        shore=shore,
        lake_depth=(1 - shore) * float(random.uniform(0.55, 0.8)),
        lake_wobble=float(random.random()),
        tree_rows=rows[np.argsort(rows[:, 1])].astype(np.float32),
        round_trees=bool(random.random() < 0.5),
        stars=random.random((70, 3)).astype(np.float32),
        clouds=random.standard_normal((5, 8)).astype(np.float32),
        texture=random.standard_normal((24, 24)).astype(np.float32),
    )


def _ridge_profile(layout: Layout, index: int, u: Floats) -> Floats:
    """Height of a range over its foot along u, in fractions of the image's height."""
    roughness = _ROUGHNESS[layout.kind]
    total = np.zeros_like(u)
    for octave in range(_OCTAVES):
        phase, stretch = layout.phases[index, octave]
        frequency = 1.3 * 1.9**octave * (0.8 + 0.4 * stretch)
        cycle = frequency * u + phase
        pointed = 2 * np.abs(2 * (cycle - np.floor(cycle + 0.5))) - 1
        wave = pointed if layout.kind == "mountains" else np.sin(2 * np.pi * cycle)
        total += wave / (1.9**octave) ** roughness
    height: Floats = _RIDGE_HEIGHT[layout.kind] * (1 - 0.28 * index) * (0.55 + 0.33 * total)
    return height.astype(np.float32)


def _resize(field: Floats, width: int, height: int) -> Floats:
    image = Image.fromarray(field).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32)


def _build_layer(layout: Layout, index: int, texture: Floats, size: tuple[int, int]) -> tuple[Layer, Floats]:
    width, height = size
    u = (np.arange(-width, 2 * width) / width).astype(np.float32)
    foot = layout.horizon + 0.05 * index
    wide = _ridge_profile(layout, index, u)
    profile, slope = wide[width : 2 * width], np.gradient(wide)
    top = (foot - profile) * height
    rows = np.arange(height, dtype=np.float32)[:, None]
    depth = rows - top
    below = np.clip(depth / np.maximum(profile.max() * height, 1.0), 0, 1)
    shift = (np.arange(width)[None] + width + (0.45 * np.clip(depth, 0, height)).astype(np.intp)) % (3 * width)
    faces = np.tanh(slope[shift] * width * 1.4)
    strength = {"mountains": 0.22, "hills": 0.10, "dunes": 0.14}[layout.kind]
    shade = 1 + strength * faces + 0.05 * texture
    return Layer(np.clip(depth + 0.5, 0, 1), shade.astype(np.float32), below.astype(np.float32)), top


def _build_trees(layout: Layout, size: tuple[int, int]) -> tuple[Floats, Floats]:
    width, height = size
    cover, shade = np.zeros((height, width), np.float32), np.ones((height, width), np.float32)
    if not layout.trees:
        return cover, shade
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    for u, foot, tall in layout.tree_rows:
        across, tall_pixels = (columns - u * width) / (tall * height), tall * height
        up = (foot * height - rows) / tall_pixels
        if layout.round_trees:
            edge = 0.33 - np.hypot(across, up - 0.62)
            trunk = np.minimum(0.035 - np.abs(across), np.minimum(up, 0.5 - up))
            edge = np.maximum(edge, trunk)
        else:
            edge = np.minimum((1 - up) * 0.30 * (0.8 + 0.35 * ((up * 3.5) % 1 < 0.5)) - np.abs(across), up)
        mask = np.clip(edge * tall_pixels + 0.5, 0, 1)
        cover = np.maximum(cover, mask)
        shade = np.where(mask > 0.5, 1.0 + 0.5 * across + 0.25 * (up - 0.6), shade).astype(np.float32)
    return cover, shade


def _build_stars(layout: Layout, size: tuple[int, int]) -> Floats:
    width, height = size
    stars = np.zeros((height, width), np.float32)
    rows = (layout.stars[:, 1] * layout.horizon * height).astype(np.intp)
    columns = (layout.stars[:, 0] * width).astype(np.intp)
    stars[rows, columns] = 0.4 + 0.6 * layout.stars[:, 2]
    return stars


def _build_mirror(layout: Layout, size: tuple[int, int]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    width, height = size
    rows = np.arange(height)
    shore = layout.shore * height
    wobble = 1.6 * width / 128 * np.sin(rows * 80.0 / height + 6.3 * layout.lake_wobble)
    source = np.clip(2 * shore - rows - 1, 0, height - 1).astype(np.intp)
    columns = np.clip(np.arange(width)[None] + np.round(wobble)[:, None], 0, width - 1).astype(np.intp)
    return source[:, None], columns


def build_geometry(layout: Layout, width: int = 128, height: int = 128) -> Geometry:
    """Turn a layout into masks for images of one size."""
    size = (width, height)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    texture = _resize(layout.texture, width, height)
    built = [_build_layer(layout, index, texture, size) for index in range(2 if layout.kind == "dunes" else 3)]
    shore = layout.shore * height
    distance = np.hypot(columns - layout.sun[0] * width, rows - layout.sun[1] * height) / (0.055 * height)
    down = np.clip((rows - shore) / (height - shore), 0, 1)
    end = shore + layout.lake_depth * height
    bank = end + 2.0 * np.sin(columns / width * 11 + 6.3 * layout.lake_wobble)
    lake = np.clip(rows - shore + 0.5, 0, 1) * np.clip(bank - rows + 0.5, 0, 1) if layout.lake else np.zeros_like(rows)
    trees, tree_shade = _build_trees(layout, size)
    return Geometry(
        layout=layout,
        sky_ramp=np.clip(rows / (layout.horizon * height), 0, 1),
        sun_disc=np.clip((1 - distance) * 0.055 * height + 0.5, 0, 1),
        sun_glow=np.exp(-((distance / 4) ** 2)),
        stars=_build_stars(layout, size),
        clouds=np.clip(_resize(layout.clouds, width, height) * 0.55 - 0.15, 0, 1) * np.clip(1.3 - down, 0, 1),
        layers=tuple(layer for layer, _ in built),
        ground=np.clip(rows - shore + 0.5, 0, 1),
        ground_shade=(1.06 - 0.30 * down + 0.06 * texture).astype(np.float32),
        lake=lake.astype(np.float32),
        mirror=_build_mirror(layout, size),
        trees=trees,
        tree_shade=tree_shade,
        ridge=np.min([top for _, top in built], axis=0).astype(np.float32),
    )


def _colour(colour: Colour) -> Floats:
    return np.array(colour, np.float32)


def _mix(under: Floats, over: Floats | Colour, share: Floats | float) -> Floats:
    weight = share[..., None] if isinstance(share, np.ndarray) else np.float32(share)
    return under + (np.asarray(over, np.float32) - under) * weight


def _paint_sky(geometry: Geometry, time: TimeOfDay) -> Floats:
    sky = _mix(np.broadcast_to(_colour(time.zenith), (*geometry.ground.shape, 3)), time.horizon, geometry.sky_ramp)
    sky = _mix(sky, time.cloud, geometry.clouds * time.cloud_strength)
    if time.stars:
        sky = _mix(sky, (1.0, 1.0, 1.0), geometry.stars * time.stars)
    if time.sun is not None:
        sky = _mix(sky, time.sun, geometry.sun_glow * time.glow)
        sky = _mix(sky, time.sun, geometry.sun_disc)
    return sky


def paint(geometry: Geometry, time: str = "noon", season: str = "summer") -> Floats:
    """Colour a geometry: H x W x 3 in 0..1. Raises KeyError for an unknown time or season."""
    light_of_day, look = TIMES[time], SEASONS[season]
    light, haze = _colour(light_of_day.light), _colour(light_of_day.horizon)
    ground, rock = _colour(look.ground), _colour(look.rock)
    if geometry.layout.kind == "dunes":
        ground = _colour(SAND) + (ground - _colour(SAND)) * np.float32(look.dune_blend)
        rock = _colour(SAND_ROCK) + (rock - _colour(SAND_ROCK)) * np.float32(look.dune_blend)
    image = _paint_sky(geometry, light_of_day)
    snow_line = look.snow if geometry.layout.kind == "mountains" or season == "winter" else 0.0
    for index, layer in enumerate(geometry.layers):
        near = (index + 1) / len(geometry.layers)
        body = rock + (ground - rock) * np.float32(index / len(geometry.layers))
        colours = np.broadcast_to(body, image.shape)
        if snow_line and (index == 0 or season == "winter"):
            colours = _mix(colours, SNOW, np.clip((snow_line - layer.below_ridge) * 8, 0, 1))
        colours = colours * light * layer.shade[..., None]
        veil = (0.45 + light_of_day.fog * 0.5) * (1 - near) + light_of_day.fog * 0.45
        image = _mix(image, _mix(colours, haze, veil), layer.coverage)
    meadow = _mix(ground * light * geometry.ground_shade[..., None], haze, light_of_day.fog * 0.6)
    image = _mix(image, meadow, geometry.ground)
    if geometry.layout.lake:
        water = _mix(image[geometry.mirror], _colour(WATER) * light, 0.28)
        image = _mix(image, _mix(water, _colour(SNOW) * light, look.ice * 0.8), geometry.lake)
    if geometry.layout.trees:
        crown = _colour(look.broadleaf if geometry.layout.round_trees else look.conifer)
        crowns = _mix(crown * light * geometry.tree_shade[..., None], haze, light_of_day.fog * 0.5)
        image = _mix(image, crowns, geometry.trees)
    return np.clip(image, 0, 1)


def render(seed: int, time: str = "noon", season: str = "summer", width: int = 128, height: int = 128) -> Image.Image:
    """Render one layout at one time and season as an RGB image."""
    pixels = paint(build_geometry(draw_layout(seed), width, height), time, season)
    return Image.fromarray(np.round(pixels * 255).astype(np.uint8))

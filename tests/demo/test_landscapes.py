"""The generator: the geometry depends only on the layout, and captions are true and use only known words."""

import numpy as np
import pytest
from augmentation import augment
from captions import (
    DEFAULT_PROMPT,
    KIND_PHRASES,
    SEASON_PHRASES,
    TIME_PHRASES,
    Scene,
    default_caption,
    draw_caption,
    draw_nameless_caption,
)
from landscapes import TRAINING_LAYOUTS, UNSEEN_LAYOUTS, build_geometry, draw_layout, paint, render
from make_data import make_images
from palette import SEASONS, TIMES

MOODS = [(time, season) for time in TIMES for season in SEASONS]


def test_training_never_sees_the_layouts_of_tests() -> None:
    assert not set(TRAINING_LAYOUTS[:: len(TRAINING_LAYOUTS) - 1]) & set(UNSEEN_LAYOUTS)
    assert TRAINING_LAYOUTS.stop <= UNSEEN_LAYOUTS.start


@pytest.mark.parametrize("mood", MOODS)
def test_rendering_is_independent_of_earlier_renderings(mood: tuple[str, str]) -> None:
    first = np.asarray(render(UNSEEN_LAYOUTS[0], *mood))
    render(UNSEEN_LAYOUTS[1], "night", "winter")
    assert np.array_equal(first, np.asarray(render(UNSEEN_LAYOUTS[0], *mood)))


@pytest.mark.parametrize("seed", UNSEEN_LAYOUTS[:5])
def test_a_layout_keeps_its_geometry_under_every_caption(seed: int) -> None:
    geometry = build_geometry(draw_layout(seed))
    rows = np.arange(128)[:, None]
    sky = (rows < geometry.ridge[None] - 1) & (geometry.trees == 0)
    land = rows > geometry.ridge[None] + 1
    for time in TIMES:
        painted = {season: paint(build_geometry(draw_layout(seed)), time, season) for season in SEASONS}
        for season in ("winter", "autumn"):
            change = np.abs(painted[season] - painted["summer"]).max(axis=2)
            assert change[sky].max() == 0
            assert (change[land] > 0).mean() > 0.95
    for season in SEASONS:
        change = np.abs(paint(geometry, "night", season) - paint(geometry, "noon", season)).max(axis=2)
        assert (change[sky] > 0.02).mean() > 0.95


def test_every_mood_looks_different() -> None:
    geometry = build_geometry(draw_layout(UNSEEN_LAYOUTS[4]))
    painted = [paint(geometry, *mood) for mood in MOODS]
    for index, image in enumerate(painted):
        for other in painted[:index]:
            assert np.abs(image - other).mean() > 0.01


@pytest.mark.parametrize(("width", "height"), [(64, 64), (256, 192), (136, 72)])
def test_any_size_can_be_rendered(width: int, height: int) -> None:
    assert render(UNSEEN_LAYOUTS[4], "sunset", "autumn", width, height).size == (width, height)


def test_augmentation_stays_in_range_and_keeps_the_scene() -> None:
    image = paint(build_geometry(draw_layout(UNSEEN_LAYOUTS[4])))
    for seed in range(10):
        changed = augment(image, np.random.default_rng(seed))
        assert changed.shape == image.shape
        assert changed.min() >= 0
        assert changed.max() <= 1
        assert np.corrcoef(changed.ravel(), image.ravel())[0, 1] > 0.5
        assert not np.allclose(changed, image, atol=0.01)


def test_images_do_not_depend_on_the_worker_count() -> None:
    one, two = make_images(3, 4, size=32, workers=1), make_images(3, 4, size=32, workers=2)
    assert np.array_equal(one.pixels, two.pixels)
    assert one.scenes == two.scenes
    assert one.pixels.shape == (12, 32, 32, 3)


def test_default_prompt_is_a_caption_of_the_training_language() -> None:
    assert default_caption(Scene("mountains", lake=True, trees=False, time="sunset")) == DEFAULT_PROMPT


def test_captions_never_name_another_mood() -> None:
    random = np.random.default_rng(0)
    for time in TIMES:
        for season in SEASONS:
            others = [phrase for other in TIMES if other != time for phrase in TIME_PHRASES[other]]
            others += [phrase for other in SEASONS if other != season for phrase in SEASON_PHRASES[other]]
            for kind in KIND_PHRASES:
                captions = [draw_caption(Scene(kind, True, True, time, season), random) for _ in range(50)]
                assert len(set(captions)) > 20
                for caption in captions:
                    words = f" {caption.lower().replace(',', '')} "
                    assert not [phrase for phrase in others if phrase and f" {phrase} " in words], (
                        time,
                        season,
                        caption,
                    )


@pytest.mark.parametrize("kind", KIND_PHRASES)
def test_nameless_captions_name_only_the_mood(kind: str) -> None:
    random = np.random.default_rng(1)
    captions = {draw_nameless_caption(Scene(kind, True, True, "night", "winter"), random) for _ in range(30)}
    assert len(captions) > 5
    assert not [caption for caption in captions for phrase in KIND_PHRASES[kind] if phrase in caption.lower()]

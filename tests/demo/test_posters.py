"""The generator of posters and its captions."""

import numpy as np
import pytest
from judge import PHRASES, keeps_ridge, make_cases
from painting import SEASONS, TIMES, paint, render, to_bytes
from posters import KINDS, build_geometry, draw_layout, outlines
from posterset import AUGMENTED, TRAINING_LAYOUTS, UNSEEN_LAYOUTS, make_posters, scene_of, unseen_posters
from scenes import DEFAULT_PROMPT, MOODS, Scene, all_scenes, default_caption, draw_caption
from watercolor import PAPER, paint_watercolor

SIZE = 64


def test_rendering_is_deterministic_per_seed() -> None:
    assert render(5, size=SIZE).tobytes() == render(5, size=SIZE).tobytes()
    assert render(5, size=SIZE).tobytes() != render(6, size=SIZE).tobytes()


def test_a_layout_is_the_same_scene_at_every_size() -> None:
    """A small image is the large one made smaller, up to thin lines and stars."""
    large = np.asarray(render(11, size=256).resize((SIZE, SIZE), 4), dtype=np.float32)
    small = np.asarray(render(11, size=SIZE), dtype=np.float32)
    assert np.abs(large - small).mean() < 4


@pytest.mark.parametrize("mood", MOODS, ids=" ".join)
def test_every_mood_can_be_painted_and_differs_from_noon_in_summer(mood: tuple[str, str]) -> None:
    geometry = build_geometry(draw_layout(3), SIZE)
    pixels = to_bytes(paint(geometry, *mood))
    assert pixels.shape == (SIZE, SIZE, 3)
    gap = np.abs(pixels.astype(int) - to_bytes(paint(geometry)).astype(int)).mean()
    assert (gap > 4) == (mood != ("noon", "summer"))


def test_night_is_dark_but_not_black() -> None:
    for seed in UNSEEN_LAYOUTS[:6]:
        geometry = build_geometry(draw_layout(seed), SIZE)
        night, noon = (to_bytes(paint(geometry, time)).mean() for time in ("night", "noon"))
        assert 30 < night < 0.6 * noon


def test_layouts_have_all_kinds_of_land_with_and_without_trees() -> None:
    layouts = [draw_layout(seed) for seed in range(60)]
    assert {layout.kind for layout in layouts} == set(KINDS)
    assert {(layout.lake, layout.trees) for layout in layouts if layout.kind == "hills"} == {
        (lake, trees) for lake in (False, True) for trees in (False, True)
    }


def test_training_and_unseen_layouts_are_disjoint() -> None:
    assert not set(TRAINING_LAYOUTS) & set(UNSEEN_LAYOUTS[:1000])
    assert unseen_posters(2, size=SIZE).shape == (2, SIZE, SIZE, 3)


def test_a_set_groups_the_images_of_a_layout_source_first() -> None:
    posters = make_posters(2, 4, SIZE, workers=1)
    assert posters.pixels.shape == (8, SIZE, SIZE, 3)
    for group in range(2):
        images, scenes = posters.pixels[group * 4 :][:4], posters.scenes[group * 4 :][:4]
        assert np.array_equal(images[0], np.asarray(render(group, size=SIZE)))
        assert not np.array_equal(images[AUGMENTED], images[0])
        assert scenes[0] == scenes[AUGMENTED] == scene_of(draw_layout(group))
        assert {(scene.kind, scene.lake, scene.trees) for scene in scenes} == {(scenes[0].kind, scenes[0].lake, scenes[0].trees)}


def test_default_prompt_is_the_plainest_caption_of_its_scene() -> None:
    assert default_caption(Scene("mountains", True, False, "sunset")) == DEFAULT_PROMPT


def test_captions_name_the_mood_and_often_omit_the_landscape() -> None:
    random = np.random.default_rng(1)
    for time in TIMES:
        for season in SEASONS:
            captions = [draw_caption(Scene("dunes", False, False, time, season), random).lower() for _ in range(60)]
            nameless = [caption for caption in captions if "dune" not in caption and "desert" not in caption]
            assert 10 < len(nameless) < 50
            if season == "winter":
                assert all("winter" in caption or "snow" in caption for caption in captions if "landscape" not in caption)


def test_scenes_cover_every_layout() -> None:
    scenes = set(all_scenes())
    assert all(scene_of(draw_layout(seed), *MOODS[seed % len(MOODS)]) in scenes for seed in range(200))
    assert len(scenes) == len(all_scenes())


def test_the_judge_accepts_the_generators_posters_and_refuses_the_source() -> None:
    cases = make_cases(6, size=SIZE)
    for mood in PHRASES:
        assert all(case.follows(case.painted[mood], mood) for case in cases)
        assert all(case.nearest_mood(case.painted[mood]) == mood for case in cases)
        assert not any(case.follows(case.source, mood) for case in cases)
    assert all(keeps_ridge(case.painted["sunset"], cases, index) for index, case in enumerate(cases))
    assert not any(keeps_ridge(case.source, cases, (index + 1) % len(cases)) for index, case in enumerate(cases))


def test_outlines_are_where_areas_meet() -> None:
    geometry = build_geometry(draw_layout(1_000_020), 128)
    lines = outlines(geometry)
    assert set(np.unique(lines)) == {0, 255}
    assert 0.02 < (lines > 0).mean() < 0.25
    painted = paint(geometry).mean(axis=0)
    jumps = np.abs(np.diff(painted, axis=0))
    on_lines = lines[:-1] > 0
    assert jumps[on_lines].mean() > 2 * jumps[~on_lines].mean()


def test_watercolor_keeps_the_scene_and_has_a_paper_border() -> None:
    poster = np.asarray(render(1_000_020, "sunset", size=128))
    painted = paint_watercolor(poster, np.random.default_rng(1))
    assert np.array_equal(painted, paint_watercolor(poster, np.random.default_rng(1)))
    border = np.concatenate([painted[:3].reshape(-1, 3), painted[:, :3].reshape(-1, 3)])
    assert np.abs(border / 255 - PAPER).max() < 0.02
    inside = (slice(16, -16), slice(16, -16))
    assert np.corrcoef(poster[inside].ravel(), painted[inside].ravel())[0, 1] > 0.9
    assert painted[inside].mean() > poster[inside].mean() + 10

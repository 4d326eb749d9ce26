"""Captions for generated landscapes in many forms: all the language that the demo model is trained on.

A caption describes an image; an omitted time means noon and an omitted season summer, so that "at night" or "in winter" alone is
unambiguous. Things (mountains, lake, trees) may be omitted.
"""

from dataclasses import dataclass

import numpy as np

DEFAULT_PROMPT = "A beautiful landscape with mountains and a lake at sunset"

KIND_PHRASES = {
    "mountains": ("mountains", "mountains", "high mountains", "a mountain range", "rocky peaks"),
    "hills": ("hills", "hills", "rolling hills", "gentle hills", "low hills"),
    "dunes": ("desert dunes", "desert dunes", "sand dunes", "a desert", "dunes"),
}
LAKE_PHRASES = ("a lake", "a lake", "a calm lake", "water", "the reflection in a lake")
TREE_PHRASES = ("trees", "trees", "some trees", "a few trees", "a forest")
TIME_PHRASES = {
    "noon": ("", "", "at noon", "at midday", "on a sunny day", "by day", "in daylight"),
    "sunset": ("at sunset", "at sunset", "at sunset", "at dusk", "in the evening", "under an orange sky"),
    "sunrise": ("at sunrise", "at sunrise", "at dawn", "in the early morning"),
    "night": ("at night", "at night", "at night", "by night", "in the moonlight", "under the stars"),
    "fog": ("on a foggy day", "on a foggy day", "in fog", "in the fog", "in thick fog", "in the mist"),
}
SEASON_PHRASES = {
    "summer": ("", "", "", "in summer", "on a summer day"),
    "winter": ("in winter", "in winter", "in winter", "in the snow", "covered in snow"),
    "autumn": ("in autumn", "in autumn", "in autumn", "in fall", "with autumn colours"),
}
TIME_WORDS = {"noon": "sunny", "sunset": "sunset", "sunrise": "sunrise", "night": "night", "fog": "foggy"}
SEASON_WORDS = {"summer": "", "winter": "winter", "autumn": "autumn"}
OPENINGS = (
    "a beautiful landscape",
    "a beautiful landscape",
    "a landscape",
    "a photo of a landscape",
    "a painting of a landscape",
    "beautiful scenery",
    "a wide view",
    "the same landscape",
)
EXTRA_WORDS = (
    "photo painting picture drawing image scene scenery nature sky sun moon stars cloud clouds rain storm snowy ice "
    "forest tree hill mountain peak valley river sea beach field meadow grass flowers rock rocks road house city "
    "spring summer autumn fall winter morning noon evening night day dark bright warm cold red orange yellow green "
    "blue purple white black grey golden colourful highly detailed realistic soft light misty fog foggy and or with "
    "without of in on at by over under near behind the a an no not very more less blurry ugly low quality"
)
"""Words outside the grammar that get whole tokens, so that free prompts stay short; their meaning is not trained."""


@dataclass(frozen=True, slots=True)
class Scene:
    """The attributes of an image that captions describe."""

    kind: str
    lake: bool
    trees: bool
    time: str = "noon"
    season: str = "summer"


def default_caption(scene: Scene) -> str:
    """The plainest caption of a scene; for mountains and a lake at sunset it is the default prompt."""
    things = [KIND_PHRASES[scene.kind][0]]
    things += ["a lake"] if scene.lake else []
    things += ["trees"] if scene.trees else []
    parts = [OPENINGS[0], "with", " and ".join(things), SEASON_PHRASES[scene.season][0], TIME_PHRASES[scene.time][0]]
    caption = " ".join(part for part in parts if part)
    return caption[0].upper() + caption[1:]


def _things(scene: Scene, random: np.random.Generator) -> str:
    """Name the things of a scene in random order, sometimes omitting some, never all."""
    names = [str(random.choice(KIND_PHRASES[scene.kind]))]
    if scene.lake and random.random() < 0.8:
        names.append(str(random.choice(LAKE_PHRASES)))
    if scene.trees and random.random() < 0.8:
        names.append(str(random.choice(TREE_PHRASES)))
    if random.random() < 0.3:
        names = [names[index] for index in random.permutation(len(names))]
    if len(names) == 3 and random.random() < 0.5:
        return f"{names[0]}, {names[1]} and {names[2]}"
    return " and ".join(names)


def draw_caption(scene: Scene, random: np.random.Generator) -> str:
    """Draw one caption of a scene, in one of seven sentence forms."""
    form = random.random()
    if form < 0.12:
        return default_caption(scene)
    opening, things = str(random.choice(OPENINGS)), _things(scene, random)
    moods = [str(random.choice(SEASON_PHRASES[scene.season])), str(random.choice(TIME_PHRASES[scene.time]))]
    if random.random() < 0.5:
        moods.reverse()
    mood = " ".join(part for part in moods if part)
    if form < 0.32:
        return " ".join(part for part in (opening, "with", things, mood) if part)
    if form < 0.48:
        return mood or things
    if form < 0.62:
        return f"{things} {mood}".strip()
    if form < 0.74:
        return f"{mood}, {things}" if mood else things
    if form < 0.84:
        return f"{opening} {mood}".strip()
    adjectives = [SEASON_WORDS[scene.season], TIME_WORDS[scene.time] if scene.time != "noon" or form < 0.9 else ""]
    adjective = " ".join(part for part in adjectives if part)
    return f"a {adjective} landscape with {things}" if adjective else f"{opening} with {things}"


def draw_nameless_caption(scene: Scene, random: np.random.Generator) -> str:
    """Draw a caption that does not name the kind of land, such as "at night": only the source image shows it."""
    kinds = [phrase for phrases in KIND_PHRASES.values() for phrase in phrases]
    while True:
        caption = draw_caption(scene, random)
        if not any(kind in caption.lower() for kind in kinds):
            return caption

"""Presets: named settings. A few are built in; the user's own are kept in the browser's local storage."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from img2img_playground.settings import Settings

BUILT_IN: Mapping[str, Mapping[str, Any]] = {
    "Subtle": {"strength": 0.35, "num_inference_steps": 30, "guidance_scale": 6.0},
    "Balanced": {"strength": 0.6, "num_inference_steps": 25, "guidance_scale": 7.5},
    "Strong": {"strength": 0.9, "num_inference_steps": 30, "guidance_scale": 8.0},
    "Draft": {"num_inference_steps": 10, "image_count": 1},
}
MOST_PRESETS = 50
LONGEST_NAME = 60
STORAGE_KEY = "img2img.presets"


class Presets:
    """The built-in presets and the user's own, by name."""

    def __init__(self) -> None:
        self._own: dict[str, dict[str, Any]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All names; the user's own come first, in order of their last change."""
        return (*self._own, *(name for name in BUILT_IN if name not in self._own))

    def is_own(self, name: str | None) -> bool:
        """Whether this preset is the user's, so that it can be deleted."""
        return name in self._own

    def apply(self, name: str, settings: Settings) -> Settings:
        """The settings with the preset's values. The seed stays. Raises KeyError for an unknown name."""
        values = self._own[name] if name in self._own else BUILT_IN[name]
        return Settings.checked({**asdict(settings), **values})

    def save(self, name: str, settings: Settings) -> None:
        """Saves everything but the seed under a name, or replaces what has this name. Raises ValueError for an unusable name."""
        name = " ".join(name.split())
        if not name or len(name) > LONGEST_NAME:
            raise ValueError(f"A name has 1 to {LONGEST_NAME} characters.")
        if name not in self._own and len(self._own) >= MOST_PRESETS:
            raise ValueError(f"{MOST_PRESETS} presets are saved already. Delete one first.")
        values = asdict(settings)
        del values["seed"]
        self._own = {name: values, **{other: kept for other, kept in self._own.items() if other != name}}

    def delete(self, name: str) -> None:
        """Deletes one of the user's own, if it exists."""
        self._own.pop(name, None)

    def dump(self) -> str:
        """The user's own as JSON, for the browser."""
        return json.dumps(self._own)

    def load(self, text: object) -> None:
        """Takes the user's own from the browser. Ignores invalid presets, such as those of a later version."""
        try:
            found = json.loads(text) if isinstance(text, str) else {}
        except ValueError:
            return
        for name, values in found.items() if isinstance(found, dict) else ():
            if len(self._own) < MOST_PRESETS and 0 < len(name) <= LONGEST_NAME and isinstance(values, dict):
                try:
                    Settings.checked(values)
                except (TypeError, ValueError):
                    continue
                self._own[name] = {key: value for key, value in values.items() if key != "seed"}

"""The list of presets, with buttons to save the settings as one and to delete one."""

import json
from collections.abc import Callable

from nicegui import ui

from img2img_playground.presets import LONGEST_NAME, STORAGE_KEY, Presets
from img2img_playground.settings import Settings


class PresetBar:
    """Calls `apply` with a preset's name and settings when it is chosen. `settings` gives those on the page."""

    def __init__(self, settings: Callable[[], Settings], apply: Callable[[str, Settings], None]) -> None:
        self._presets = Presets()
        self._showing = False
        self._settings, self._apply = settings, apply
        with ui.element("div").classes("preset-bar"):
            self._list = ui.select(list(self._presets.names), label="Preset", on_change=lambda event: self._choose(event.value))
            self._list.props("outlined dense hide-bottom-space popup-content-class=menu")
            save = ui.button(icon="bookmark_add", on_click=self._ask_name).props('flat round aria-label="Save as preset"')
            save.tooltip("Save the settings as a preset")
            self._delete = ui.button(icon="delete_outline", on_click=self._delete_chosen)
            self._delete.props('flat round aria-label="Delete preset"').tooltip("Delete this preset")
        with ui.dialog() as self._dialog, ui.card().classes("name-card"):
            ui.label("Save the settings as a preset").classes("card-title")
            self._name = ui.input("Name").props(f"outlined autofocus maxlength={LONGEST_NAME} hide-bottom-space")
            self._name.on("keydown.enter", self._save)
            with ui.element("div").classes("code-actions"):
                ui.button("Save", on_click=self._save).props("unelevated no-caps")
                ui.button("Cancel", on_click=self._dialog.close).props('flat no-caps aria-label="Do not save"')
        self._dialog.props('aria-label="Save the settings as a preset"')
        self._show(None)

    def show(self, settings: Settings) -> None:
        """Shows the name of the preset that was chosen last only as long as the settings are those of it."""
        name = self._list.value
        if name is not None and self._presets.apply(name, settings) != settings:
            self._show(None)

    def load(self, stored: object) -> None:
        """Takes the user's presets from the browser's storage."""
        self._presets.load(stored)
        self._show(None)

    def _show(self, chosen: str | None) -> None:
        self._showing = True
        self._list.set_options(list(self._presets.names), value=chosen)
        self._showing = False
        self._delete.set_visibility(self._presets.is_own(chosen))

    def _choose(self, name: str | None) -> None:
        if self._showing:
            return
        self._delete.set_visibility(self._presets.is_own(name))
        if name is not None:
            self._apply(name, self._presets.apply(name, self._settings()))

    def _ask_name(self) -> None:
        self._name.value = self._list.value if self._presets.is_own(self._list.value) else ""
        self._name.error = None
        self._dialog.open()

    def _save(self) -> None:
        try:
            self._presets.save(self._name.value or "", self._settings())
        except ValueError as error:
            self._name.error = str(error)
            return
        self._dialog.close()
        self._show(self._presets.names[0])
        self._store()

    def _delete_chosen(self) -> None:
        chosen = self._list.value
        self._show(None)
        self._presets.delete(chosen)
        self._show(None)
        self._store()

    def _store(self) -> None:
        ui.run_javascript(f"localStorage.setItem({json.dumps(STORAGE_KEY)}, {json.dumps(self._presets.dump())})")

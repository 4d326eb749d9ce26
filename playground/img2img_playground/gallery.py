"""The history as a row of thumbnails; clicking one restores its source, settings and result."""

from collections.abc import Callable

from nicegui import ui

from img2img_playground.history import Entry, History


class Gallery:
    """Shows the history, newest first."""

    def __init__(
        self, address: Callable[[str], str], archive: str, recall: Callable[[Entry], None], clear: Callable[[], None]
    ) -> None:
        """`archive` is the address of a ZIP file of all results."""
        self._address, self._recall = address, recall
        self._shown: tuple[str, ...] = ()
        with ui.element("section").classes("card history").props('aria-label="History"') as self._section:
            with ui.element("div").classes("history-head"):
                ui.label("History").classes("card-title")
                ui.label("of this tab; kept for half an hour after it is closed").classes("control-hint grow")
                save = ui.button("Save all", icon="archive").props("flat dense no-caps tag=a download=img2img-results.zip")
                save.props["href"] = archive
                ui.button("Clear", on_click=clear).props("flat dense no-caps")
            self._row = ui.element("div").classes("history-row")
        self._section.set_visibility(False)

    def show(self, history: History, shown: Entry | None) -> None:
        """Shows the entries, and highlights the one on the stage."""
        current = shown.id if shown is not None else ""
        wanted = (current, *(entry.id for entry in history))
        if wanted == self._shown:
            return
        self._shown = wanted
        self._section.set_visibility(len(history) > 0)
        self._row.clear()
        with self._row:
            for entry in history:
                self._add(entry, entry.id == current)

    def _add(self, entry: Entry, current: bool) -> None:
        words = f"{entry.settings.prompt[:80]}, seed {entry.settings.seed}"
        button = ui.element("button").classes("history-entry").on("click", lambda: self._recall(entry))
        button.props["aria-label"] = f"Restore: {words}"
        button.props["title"] = words
        button.props["type"] = "button"
        if current:
            button.props["aria-current"] = "true"
        with button:
            image = ui.element("img")
            image.props.update({"src": self._address(entry.id), "alt": "", "loading": "lazy"})
            ui.label(f"seed {entry.settings.seed}").classes("history-words")

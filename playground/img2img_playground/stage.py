"""The middle of the page: the image, the error banner and the toolbar of a result."""

import base64
from collections.abc import Callable
from dataclasses import dataclass

from nicegui import ui

from img2img_playground.components import ImagePicker, ImageStage
from img2img_playground.extras import takes_mask
from img2img_playground.failures import Failure, describe
from img2img_playground.history import Entry
from img2img_playground.session import Notice, Session


@dataclass(frozen=True, slots=True)
class StageActions:
    """The callbacks of the stage's buttons."""

    refused: Callable[[str, int], None]
    again: Callable[[], None]
    dismiss: Callable[[], None]
    undo: Callable[[], None]
    use_result: Callable[[], None]
    code: Callable[[], None]


class Stage:
    """Shows a session's source, run, result and failure. `address` maps an image's id to its address."""

    def __init__(self, uploads: str, address: Callable[[str], str], actions: StageActions) -> None:
        """`uploads` is the address of the tab, below which images are PUT."""
        self._address = address
        with ui.element("section").classes("card stage").props('aria-label="Image"'):
            self._image = ImageStage(f"{uploads}/mask")
            with ui.element("div").classes("stage-foot"):
                self._name = ui.label().classes("stage-name")
                self._picker = ImagePicker(f"{uploads}/source", actions.refused, "Change image", everywhere=True)
            self._banner(actions)
            self._notice_bar(actions)
            self._warnings = ui.label().classes("stage-warnings").props("role=status")
            self._toolbar(actions)

    def _banner(self, actions: StageActions) -> None:
        with ui.element("div").classes("banner").props("role=alert") as self._alert:
            ui.icon("error_outline").props("aria-hidden=true")
            with ui.element("div").classes("grow"):
                self._title = ui.label().classes("banner-title")
                self._text = ui.label().classes("banner-text")
            self._again = ui.button("Try again", on_click=actions.again).props("flat dense no-caps")
            ui.button(icon="close", on_click=actions.dismiss).props('flat round dense aria-label="Dismiss"')

    def _notice_bar(self, actions: StageActions) -> None:
        with ui.element("div").props("role=status"), ui.element("div").classes("notice") as self._notice:
            self._notice_text = ui.label().classes("grow")
            self._undo = ui.button("Undo", on_click=actions.undo).props("flat dense no-caps")
            ui.button(icon="close", on_click=actions.dismiss).props('flat round dense aria-label="Dismiss notice"')

    def _toolbar(self, actions: StageActions) -> None:
        with ui.element("div").classes("toolbar") as self._tools:
            self._facts = ui.label().classes("facts grow")
            ui.button("Use as source", icon="redo", on_click=actions.use_result).props("flat dense no-caps")
            self._download = ui.button("Download", icon="download").props("flat dense no-caps")
            ui.button("Python", icon="code", on_click=actions.code).props('flat dense no-caps aria-label="Python program"')

    def show(self, session: Session) -> None:
        """Updates the stage from the session."""
        run, entry = session.run, session.shown
        source = run.source if run is not None else session.source
        self._image.set_visibility(source is not None)
        self._picker.show(compact=source is not None)
        self._name.set_visibility(source is not None)
        if source is not None:
            self._name.text = f"{source.name} · {source.width} x {source.height} pixels"
            before = (self._address(source.id), source.name)
            if run is not None:
                preview = "" if run.preview is None else f"data:image/jpeg;base64,{base64.b64encode(run.preview).decode()}"
                self._image.show((source.width, source.height), before, preview=preview, busy=True)
            elif entry is not None:
                size = (entry.result.width, entry.result.height)
                self._image.show(size, before, self._address(entry.id), mask=self._mask(session))
            else:
                self._image.show((source.width, source.height), before, mask=self._mask(session))
        self._show_result(entry if run is None else None)
        self._show_failure(session.failure)
        self._show_notice(session.notice)

    def _mask(self, session: Session) -> str | None:
        mask = session.extras.mask
        return None if not takes_mask(session.model) else "" if mask is None else self._address(mask.id)

    def _show_result(self, entry: Entry | None) -> None:
        self._tools.set_visibility(entry is not None)
        self._warnings.text = "" if entry is None else "\n".join(describe(warning) for warning in entry.warnings)
        self._warnings.set_visibility(bool(self._warnings.text))
        if entry is None:
            return
        self._facts.text = f"Seed {entry.settings.seed} · {entry.seconds:.1f} s · {entry.model_id} on {entry.engine}"
        self._download.props.update({"href": self._address(entry.id), "download": entry.result.name, "tag": "a"})
        self._download.update()

    def _show_failure(self, failure: Failure | None) -> None:
        self._alert.set_visibility(failure is not None)
        if failure is not None:
            self._title.text, self._text.text = failure.title, failure.text
            self._again.set_visibility(failure.may_pass)

    def _show_notice(self, notice: Notice | None) -> None:
        self._notice.set_visibility(notice is not None)
        if notice is not None:
            self._notice_text.text = notice.text
            self._undo.set_visibility(notice.undo is not None)

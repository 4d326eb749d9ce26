"""The dialog with the Python program, for copying."""

from collections.abc import Sequence

from nicegui import ui

from img2img_playground.images import ImageFile

_COPY = """async () => {
  const code = document.querySelector(".code-words");
  const done = document.querySelector(".code-copied");
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch { // The clipboard API needs https or localhost.
    getSelection().selectAllChildren(code);
    document.execCommand("copy");
  }
  done.textContent = "Copied";
  setTimeout(() => (done.textContent = ""), 2000);
}"""


class CodeDialog:
    """One dialog per page; `open` sets the code."""

    def __init__(self) -> None:
        with ui.dialog() as self._dialog, ui.card().classes("code-card"):
            ui.label("The same in Python").classes("card-title")
            self._hint = ui.label().classes("control-hint")
            with ui.element("pre").classes("code-text").props('tabindex=0 aria-label="Python program"'):
                self._code = ui.label().classes("code-words")
            with ui.element("div").classes("code-actions"):
                ui.label().classes("control-hint code-copied").props("role=status")
                ui.button("Copy", icon="content_copy").props("unelevated no-caps").on("click", js_handler=_COPY)
                ui.button("Close", on_click=self._dialog.close).props("flat no-caps")
        self._dialog.props('aria-label="The same in Python"')

    def open(self, code: str, images: Sequence[ImageFile]) -> None:
        """Shows the program, which reads the files of `images`."""
        names = " and ".join(dict.fromkeys(image.name for image in images))
        self._hint.text = f"It reads {names} from the current directory, and requires img2img to be installed."
        self._code.text = code
        self._dialog.open()

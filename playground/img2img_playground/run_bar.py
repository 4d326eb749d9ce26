"""The start and cancel buttons, with the progress of the run."""

from collections.abc import Callable

from nicegui import ui

from img2img_playground.session import Run


class RunBar:
    """The bar stays visible on a phone."""

    def __init__(self, start: Callable[[], None], cancel: Callable[[], None]) -> None:
        with ui.element("div").classes("run-bar"):
            with ui.element("div").classes("run-progress") as self._progress:
                self._words = ui.label().classes("run-words").props("role=status aria-live=polite")
                with ui.element("div").classes("progress") as self._bar:
                    self._bar.props('role=progressbar aria-label="Progress" aria-valuemin=0 aria-valuemax=100')
                    self._done = ui.element("div").classes("progress-done")
            self.start = ui.button("Transform", icon="auto_awesome", on_click=start).props("unelevated no-caps").classes("start")
            self.cancel = ui.button("Cancel", icon="close", on_click=cancel).props("outline no-caps").classes("cancel")
        self.show(None, ready=False)

    def show(self, run: Run | None, *, ready: bool) -> None:
        """Shows the run, or, without one, the start button (enabled if `ready`)."""
        self._progress.set_visibility(run is not None)
        self.cancel.set_visibility(run is not None)
        self.start.set_visibility(run is None)
        self.start.set_enabled(ready)
        if run is not None:
            self._words.text = describe(run)
            self._show_share(100 * run.step // run.step_count if run.step_count else None)

    def _show_share(self, percent: int | None) -> None:
        """Shows the percentage; None: unknown."""
        self._done.classes(replace=f"progress-done{' unknown' if percent is None else ''}")
        self._done.style(replace="" if percent is None else f"width: {percent}%")
        self._bar.props.set_optional("aria-valuenow", percent)


def describe(run: Run) -> str:
    """The progress of the run in one line."""
    match run.phase:
        case "sending":
            return "Sending the image"
        case "waiting":
            return f"{run.problem} Retrying in {run.eta or 0.0:.1f} s"
        case "queued":
            place = "Next in the queue" if run.position == 0 else f"{run.position} ahead in the queue"
            return f"{place}{_left(run.eta)}"
        case "running" if not run.step_count:
            return "Reading the image"
    return f"Step {run.step} of {run.step_count}{_left(run.eta)}"


def _left(eta: float | None) -> str:
    if eta is None or eta < 0.5:
        return ""
    return f" · about {eta:.0f} s left" if eta < 90 else f" · about {eta / 60:.0f} min left"

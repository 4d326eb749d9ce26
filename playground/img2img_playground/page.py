"""The page: builds its parts, and updates them from the session and the server's state."""

from nicegui import ui

from img2img_playground.code_dialog import CodeDialog
from img2img_playground.control_list import ControlList
from img2img_playground.controls import Controls
from img2img_playground.extras import offered_controlnets
from img2img_playground.failures import Failure
from img2img_playground.gallery import Gallery
from img2img_playground.images import MAX_BYTES, ImageFile
from img2img_playground.preset_bar import PresetBar
from img2img_playground.prompt_list import PromptActions, PromptList
from img2img_playground.reference_list import ReferenceList
from img2img_playground.run_bar import RunBar
from img2img_playground.session import Session
from img2img_playground.settings import Settings, model_of
from img2img_playground.snippet import Connection, python_code
from img2img_playground.stage import Stage, StageActions
from img2img_playground.watch import ServerWatch

_WORDS = {"asking": "Connecting to", "up": "Connected to", "down": "No response from"}


class Page:
    """One page of one tab. Create it within the tab's NiceGUI client, and `close()` it when the client is deleted."""

    def __init__(self, session: Session, watch: ServerWatch, connection: Connection) -> None:
        self._session, self._watch, self._connection = session, watch, connection
        self._code = CodeDialog()
        with ui.element("div").classes("page"):
            self._header(connection.target)
            with ui.element("div").classes("main"):
                with ui.element("div").classes("left"):
                    actions = StageActions(
                        self._refused, session.start, session.dismiss, session.undo, self._use_result, self._show_code
                    )
                    tab = f"/tabs/{session.key}"
                    self._stage = Stage(tab, self._address, actions)
                    self._gallery = Gallery(self._address, f"{tab}/results.zip", session.recall, session.clear_history)
                with ui.element("section").classes("card panel").props('aria-label="Settings"'):
                    with ui.element("div").classes("controls"):
                        self._presets = PresetBar(lambda: session.settings, self._apply_preset)
                        self._references = ReferenceList(
                            f"{tab}/references", self._address, self._refused, session.remove_reference
                        )
                        self._controls = Controls(self._change, session.start, watch.refresh)
                        self._control_images = ControlList(
                            f"{tab}/controls",
                            self._address,
                            self._refused,
                            session.change_control,
                            session.remove_control,
                            watch.refresh,
                        )
                        self._image_prompts = PromptList(
                            PromptActions(
                                f"{tab}/prompts",
                                self._address,
                                self._refused,
                                session.change_prompt,
                                session.remove_prompt_image,
                                watch.refresh,
                            )
                        )
                        self._code_button = ui.button("Python for these settings", icon="code", on_click=self._show_settings_code)
                        self._code_button.props("flat dense no-caps").classes("code-button")
                    self._bar = RunBar(session.start, session.cancel)
        session.listeners.append(self.show)
        watch.listen(self._show_server_change)
        self._was_running = False
        self.show()

    def load_presets(self, stored: object) -> None:
        """Takes the user's presets from the browser's storage."""
        self._presets.load(stored)

    def close(self) -> None:
        """Removes its listeners."""
        self._watch.forget(self._show_server_change)
        if self.show in self._session.listeners:
            self._session.listeners.remove(self.show)

    def show(self) -> None:
        """Updates all parts; only changes are sent to the browser."""
        session, state = self._session, self._watch.state
        session.model = model_of(session.settings, state.models)
        session.controlnets = offered_controlnets(session.model, state.controlnets)
        if session.settings == Settings():
            session.settings = session.settings.followed(None, session.model)
        self._stage.show(session)
        self._references.show(session)
        self._control_images.show(session)
        self._image_prompts.show(session)
        self._controls.show(session.settings, state, session.failure, session.fitted_extras.given)
        self._bar.show(session.run, ready=session.source is not None)
        self._gallery.show(session.history, session.shown)
        self._presets.show(session.settings)
        self._show_server()
        running = session.run is not None
        if self._was_running and not running:  # The run may have loaded the model, or failed since the server is gone.
            self._watch.refresh()
        self._was_running = running

    def _show_server_change(self) -> None:
        if self._watch.state.problem is None:
            self._session.reconnected()
        self.show()

    def _show_server(self) -> None:
        state = self._watch.state
        problem = state.problem
        kind = "asking" if not state.known else "up" if problem is None else "down"
        self._pill.classes(replace=f"pill {kind}")
        refused = problem is not None and not problem.may_pass
        self._pill_words.text = "Refused by" if refused else _WORDS[kind]
        self._pill.props.set_optional("title", None if problem is None else f"{problem.title} {problem.text}")

    def _header(self, target: str) -> None:
        with ui.element("header").classes("top"):
            with ui.element("div").classes("brand"):
                ui.element("span").classes("mark").props("aria-hidden=true")
                with ui.element("h1"):
                    ui.label("img2img")
                ui.label("playground").classes("brand-more")
            with ui.element("div").classes("pill asking").props("role=status") as self._pill:
                ui.element("span").classes("dot").props("aria-hidden=true")
                self._pill_words = ui.label().classes("pill-words")
                ui.label(target).classes("pill-target")

    def _address(self, image_id: str) -> str:
        return f"/tabs/{self._session.key}/images/{image_id}"

    def _change(self, **settings: object) -> None:
        session, before = self._session, self._session.model
        session.set(**settings)
        if "model" in settings:  # The schedulers, the other settings and their defaults depend on the model.
            session.settings = session.settings.followed(before, model_of(session.settings, self._watch.state.models))
        if settings.keys() & {"model", "fit"}:  # The fields for a size depend on its kind.
            self.show()

    def _refused(self, name: str, size: int) -> None:
        text = (
            f"The upload of {name} failed. Is the playground still running?"
            if size < 0
            else f"{name} is larger than {MAX_BYTES // 2**20} MiB."
        )
        self._session.fail(Failure("The image cannot be used.", text, "image"))

    def _apply_preset(self, name: str, settings: Settings) -> None:
        self._session.restore(settings, f"The settings are those of the preset {name}.")

    def _use_result(self) -> None:
        if self._session.shown is not None:
            self._session.use(self._session.shown.result)

    def _show_code(self) -> None:
        entry = self._session.shown
        if entry is not None:
            code = python_code(self._connection, entry.source.name, entry.settings, entry.result.name, entry.extras.names())
            self._code.open(code, (entry.source, *entry.extras.images))

    def _show_settings_code(self) -> None:
        session = self._session
        source = session.source or ImageFile("photo.jpg", "image/jpeg", 1, 1, b"")
        settings, extras = session.fitted()
        code = python_code(self._connection, source.name, settings, f"{source.stem}-after.png", extras.names())
        self._code.open(code, (source, *extras.images))

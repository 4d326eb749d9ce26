"""The control images: for each, its ControlNet, its scale and its part of the steps; and a picker, for models that take them."""

from collections.abc import Callable
from dataclasses import replace

from nicegui import ui

from img2img_playground.components import ImagePicker, thumbnail
from img2img_playground.extras import ControlImage, control_numbers, most_controls, names_controlnets
from img2img_playground.images import ImageFile
from img2img_playground.number_control import NumberControl
from img2img_playground.session import Session


class ControlList:
    """`upload` is where images are PUT; `address` maps an image's id to its address; `change` is called with a changed control,
    `remove` with an image, and `refresh` before a list of ControlNets opens."""

    def __init__(
        self,
        upload: str,
        address: Callable[[str], str],
        refused: Callable[[str, int], None],
        change: Callable[[ControlImage], None],
        remove: Callable[[ImageFile], None],
        refresh: Callable[[], None],
    ) -> None:
        self._address, self._change, self._remove, self._refresh = address, change, remove, refresh
        self._rows: list[_ControlRow] = []
        self._offered: tuple[str, ...] | None = None
        self._names: tuple[str, ...] = ()
        with ui.element("div").classes("control-images").props('role=group aria-label="Control images"') as self._box:
            self._hint = ui.label().classes("control-hint")
            self._list = ui.element("div").classes("control-rows")
            self._picker = ImagePicker(upload, refused, "Add a control image", everywhere=False)

    def show(self, session: Session) -> None:
        """Shows the session's control images if its model takes them, and ControlNets fit it or it needs none."""
        most = most_controls(session.model)
        controls = session.extras.controls[:most]  # others stay, for models that take more
        offered = session.controlnets if names_controlnets(session.model) else None
        numbers = control_numbers(session.model)
        self._box.set_visibility(most > 0 and (offered is None or bool(offered or controls)))
        self._hint.text = (
            "Control image, which this model needs: edges or a depth map that the result follows"
            if offered is None
            else f"Control images, up to {most}: edges, depth or a pose that the result follows"
        )
        self._picker.set_visibility(len(controls) < most)
        changed = (offered, numbers) != (self._offered, self._names)
        if changed or [row.control.image for row in self._rows] != [control.image for control in controls]:
            self._offered, self._names = offered, numbers
            self._list.clear()
            with self._list:
                self._rows = [self._row(control) for control in controls]
        wrong = None if session.failure is None else session.failure.index("controls")
        for index, (row, control) in enumerate(zip(self._rows, controls, strict=True)):
            row.show(control, is_wrong=wrong in (index, -1))

    def _row(self, control: ControlImage) -> "_ControlRow":
        return _ControlRow(control, self._offered, self._names, self._address, self._change, self._remove, self._refresh)


class _ControlRow:
    """A control image with its settings: the ControlNet, unless none are `offered` because the model has a built-in control
    input, and its `names` of ControlImage.DEFAULTS."""

    def __init__(
        self,
        control: ControlImage,
        offered: tuple[str, ...] | None,
        names: tuple[str, ...],
        address: Callable[[str], str],
        change: Callable[[ControlImage], None],
        remove: Callable[[ImageFile], None],
        refresh: Callable[[], None],
    ) -> None:
        self.control, self._report, self._showing = control, change, True
        image = control.image
        group = ui.element("div").classes("control-row").props("role=group")
        group.props["aria-label"] = f"Control image {image.name}"
        with group:
            with ui.element("div").classes("control-head"):
                thumbnail(image, address, remove)
                known = [*(offered or ()), *((control.model,) if control.model not in (offered or ()) else ())]
                self.model = ui.select(known, label="ControlNet", value=control.model, on_change=self._choose)
                self.model.set_visibility(offered is not None)
                self.model.props("outlined dense hide-bottom-space data-field=controls popup-content-class=menu").on(
                    "popup-show", refresh
                )
            set_number = self._set_number
            self._numbers = {
                "scale": NumberControl("scale", "Scale", "How closely to follow the image", 0, 2, 0.05, set_number),
                "start": NumberControl("start", "Start", "The part of the steps before it applies", 0, 1, 0.05, set_number),
                "end": NumberControl("end", "End", "The part of the steps until it stops to apply", 0, 1, 0.05, set_number),
            }
            for name, number in self._numbers.items():
                number.set_visibility(name in names)
        self._show_numbers()
        self._showing = False

    def show(self, control: ControlImage, *, is_wrong: bool) -> None:
        """Shows the settings of a control of the same image, and marks them if the server refused them."""
        if control != self.control:
            self.control, self._showing = control, True
            if control.model not in self.model.options:
                self.model.set_options([*self.model.options, control.model])
            self.model.value = control.model
            self._show_numbers()
            self._showing = False
        self.model.error = "Refused by the server" if is_wrong else None

    def _show_numbers(self) -> None:
        for name, number in self._numbers.items():
            number.show(getattr(self.control, name))

    def _choose(self, event: object) -> None:
        if not self._showing:
            self._set(model=str(getattr(event, "value", None) or ""))

    def _set_number(self, **values: float | None) -> None:
        self._set(**{name: ControlImage.DEFAULTS[name] if value is None else value for name, value in values.items()})

    def _set(self, **values: object) -> None:
        self.control = replace(self.control, **values)  # type: ignore[arg-type]
        self._report(self.control)

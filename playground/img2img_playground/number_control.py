"""A number with a slider and a field."""

import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from nicegui import ui

if TYPE_CHECKING:
    from img2img_client.values import ModelInfo


class NumberControl:
    """A number as a slider and a field; the field accepts values beyond the slider, for servers that allow them."""

    def __init__(
        self, name: str, label: str, hint: str, least: float, most: float, step: float, change: Callable[..., None]
    ) -> None:
        self._name, self._least, self._most, self._widest, self._change = name, least, most, most, change
        self._whole = step == 1
        self._following = False
        with ui.element("div").classes("number-control") as self._box:
            ui.label(label).classes("control-label").props("aria-hidden=true")
            self.field = ui.number(step=step, on_change=lambda event: self._take(event.value, self._show_on_slider))
            self.field.props(f"dense outlined hide-bottom-space no-error-icon data-field={name}")
            self.field.props["aria-label"] = label
            self._slider = ui.slider(min=least, max=most, step=step)
            self._slider.on_value_change(lambda event: self._take(event.value, self._show_in_field))
            self._slider.classes("control-slider").props["aria-label"] = label
            ui.label(hint).classes("control-hint")

    def show(self, value: float | None) -> None:
        """Shows a value without reporting a change."""
        self._following = True
        self._show_in_field(value)
        self._show_on_slider(value)
        self._following = False

    def set_visibility(self, visible: bool) -> None:
        """Shows or hides the control."""
        self._box.set_visibility(visible)

    def follow(self, model: "ModelInfo | None", given: Collection[str], is_usual: bool = True) -> None:
        """Hides the control if the model does not take the number beside the options `given`, and bounds the slider by the
        model's maximum. A number that is not `is_usual` is hidden also if that is not known."""
        field = model and model.field(self._name)
        self._box.set_visibility((is_usual or bool(field)) and (model is None or model.takes(self._name, given)))
        self._most = self._widest if not field or field.maximum is None else min(self._widest, field.maximum)
        self._slider.props(f"max={self._most:g}")

    def _take(self, value: float | None, show: Callable[[float | None], None]) -> None:
        if self._following:
            return
        if value is not None:
            value = None if not math.isfinite(value) else round(value) if self._whole else value
        self._following = True
        show(value)
        self._following = False
        self._change(**{self._name: value})

    def _show_in_field(self, value: float | None) -> None:
        self.field.value = value

    def _show_on_slider(self, value: float | None) -> None:
        if value is not None:
            self._slider.value = min(self._most, max(self._least, value))

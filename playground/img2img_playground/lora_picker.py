"""The LoRAs of a request: a list to choose from, and a scale for each that is chosen."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from nicegui import ui

from img2img_playground.number_control import NumberControl

if TYPE_CHECKING:
    from img2img_client.values import ModelInfo


class LoraPicker:
    """Calls `change` with `loras`, the chosen ids and their scales, and `refresh` before the list opens."""

    def __init__(self, change: Callable[..., None], refresh: Callable[[], None]) -> None:
        self._change, self._showing = change, False
        self._chosen: dict[str, float] = {}
        self._offered: tuple[str, ...] = ()
        with ui.element("div").classes("loras") as self._box:
            self.field = ui.select([], label="LoRAs", multiple=True, value=[], on_change=lambda event: self._choose(event.value))
            self.field.props("outlined dense hide-bottom-space data-field=loras popup-content-class=menu").on(
                "popup-show", refresh
            )
            self._scales = ui.element("div").classes("lora-scales")

    def show(self, chosen: Mapping[str, float], offered: tuple[str, ...], model: "ModelInfo | None") -> None:
        """Shows the LoRAs of the server if the model takes some. One that the server no longer has stays in the list."""
        self._box.set_visibility(model is not None and model.field("loras") is not None and bool(offered or chosen))
        offered = (*offered, *(name for name in chosen if name not in offered))
        if offered == self._offered and dict(chosen) == self._chosen:
            return
        self._offered = offered
        self._showing = True
        self.field.set_options(list(offered), value=list(chosen))
        self._showing = False
        self._show_scales(chosen)

    def _show_scales(self, chosen: Mapping[str, float]) -> None:
        rebuild = list(chosen) != list(self._chosen) or len(chosen) != len(self._controls())
        self._chosen = dict(chosen)
        if rebuild:
            self._scales.clear()
            with self._scales:
                for name, scale in chosen.items():
                    self._add(name).show(scale)

    def _controls(self) -> list[object]:
        return list(self._scales.default_slot.children)

    def _add(self, name: str) -> NumberControl:
        def set_scale(**values: float | None) -> None:
            scale = values["loras"]
            self._chosen = {**self._chosen, name: 1.0 if scale is None else scale}
            self._change(loras=dict(self._chosen))

        return NumberControl("loras", name, "Scale of the LoRA", -2, 2, 0.05, set_scale)

    def _choose(self, names: list[str]) -> None:
        if not self._showing:
            chosen = {name: self._chosen.get(name, 1.0) for name in names}
            self._show_scales(chosen)
            self._change(loras=chosen)

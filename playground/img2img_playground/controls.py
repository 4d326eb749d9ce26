"""The settings panel: each control has a hint, and shows errors in its field."""

import math
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from nicegui import ui

from img2img_playground.failures import Failure
from img2img_playground.lora_picker import LoraPicker
from img2img_playground.number_control import NumberControl
from img2img_playground.settings import Settings, model_of
from img2img_playground.watch import COMPANIONS, ServerState

if TYPE_CHECKING:
    from img2img_client.options import Fit
    from img2img_client.values import ModelInfo
    from nicegui.elements.mixins.validation_element import ValidationElement

Change = Callable[..., None]
"""Called with changed settings, by the names of Settings."""

_FITS: "dict[Fit | Literal['', 'exact'], str]" = {
    "native": "Model's native size",
    "": "Same as the source",
    "exact": "Exact width and height",
    **{side: f"Longest side {side}" for side in (512, 768, 1024, 1536, 2048)},
}
_FIDELITIES = {"": "Exact", "high": "High: faster, hardly different", "fast": "Fast: other details"}
_CHOICES = frozenset(("scheduler", "fidelity"))
"""Settings that are None if nothing is chosen."""
_STATES = {"loading": "loading", "failed": "failed", "unloaded": "not loaded"}
_SEED_BITS = 32
_SEED_DIGITS = 19
"""Digits of 2^63 - 1, the largest seed."""


_PIXELS = 512
"""The size that the fields for an exact size start with."""


class Controls:
    """All settings. Calls `change` for each change by the user, `start` on Ctrl+Enter, and `refresh` if the models are listed."""

    def __init__(self, change: Change, start: Callable[[], None], refresh: Callable[[], None]) -> None:
        self._report, self._showing = change, False
        self._models: tuple[ModelInfo, ...] = ()
        self._shown: Settings | None = None
        self._given: frozenset[str] = frozenset()
        self._failure: Failure | None = None
        self.prompt = ui.textarea("Prompt", on_change=self._on_change("prompt")).props("outlined autogrow data-field=prompt")
        self.prompt.on("keydown.ctrl.enter", start)
        self.negative = ui.textarea("Negative prompt", on_change=self._on_change("negative_prompt"))
        self.negative.props("outlined autogrow data-field=negative_prompt")
        change = self._change
        self.strength = NumberControl("strength", "Strength", "How much to change the source", 0.05, 1, 0.05, change)
        self.steps = NumberControl("num_inference_steps", "Steps", "More steps take longer", 1, 100, 1, change)
        self.guidance = NumberControl("guidance_scale", "Guidance", "How closely to follow the prompt", 0, 20, 0.5, change)
        hint = "How strongly to avoid the negative prompt"
        self.true_cfg = NumberControl("true_cfg_scale", "True CFG scale", hint, 0, 20, 0.5, change)
        with ui.element("div").classes("seed-control"):
            self.seed = ui.input("Seed", placeholder="random each time", on_change=self._take_seed)
            self.seed.props(f"outlined dense stack-label clearable inputmode=numeric mask={'#' * _SEED_DIGITS}")
            self.seed.props("hide-bottom-space data-field=seed")
            dice = ui.button(icon="casino", on_click=self._roll).props('flat round aria-label="Random seed"')
            dice.tooltip("Set a random seed")
        hint = "Softens the edges of the mask, in pixels"
        self.mask_blur = NumberControl("mask_blur", "Mask blur", hint, 0, 64, 1, change)
        self.count = NumberControl("image_count", "Images", "How many to make, with a seed each", 1, 8, 1, change)
        with ui.element("div").classes("choices"):
            self.model = ui.select({"": "Server's default"}, label="Model", value="", on_change=self._take_model)
            self.model.props("outlined dense hide-bottom-space data-field=model popup-content-class=menu").on(
                "popup-show", refresh
            )
            self.scheduler = ui.select(
                {"": "Model's default"}, label="Scheduler", value="", on_change=self._on_change("scheduler")
            )
            self.scheduler.props("outlined dense hide-bottom-space data-field=scheduler popup-content-class=menu")
            self.fidelity = ui.select({"": "Exact"}, label="Fidelity", value="", on_change=self._on_change("fidelity"))
            self.fidelity.props("outlined dense hide-bottom-space data-field=fidelity popup-content-class=menu")
            self.fit = ui.select(dict(_FITS), label="Size", value="native", on_change=self._take_fit)
            self.fit.props("outlined dense hide-bottom-space data-field=fit popup-content-class=menu")
            with ui.element("div").classes("exact-size") as self._exact:
                self.width, self.height = (self._pixels(name) for name in ("width", "height"))
            self.loras = LoraPicker(change, refresh)

    def show(self, settings: Settings, state: ServerState, failure: Failure | None, given: frozenset[str]) -> None:
        """Shows the settings, the server's models and schedulers, and an error in the invalid field. `given` are the options that
        are set elsewhere."""
        self.mask_blur.set_visibility("mask" in given)
        self.loras.show(settings.loras, state.loras, model_of(settings, state.models))
        self._showing = True
        if state.models != self._models or settings != self._shown or given != self._given:
            self._models, self._given = state.models, given
            self._show_choices(settings)
            self._follow(model_of(settings, state.models), given)
        if settings != self._shown:
            self.prompt.value, self.negative.value = settings.prompt, settings.negative_prompt
            self.strength.show(settings.strength)
            self.steps.show(settings.num_inference_steps)
            self.guidance.show(settings.guidance_scale)
            self.true_cfg.show(settings.true_cfg_scale)
            self.seed.value = "" if settings.seed is None else str(settings.seed)
            self.count.show(settings.image_count)
            self.mask_blur.show(settings.mask_blur or 0)
            fit = "exact" if settings.has_exact_size else settings.fit or ""
            self.fit.set_options(_FITS if fit in _FITS else {**_FITS, fit: f"Longest side {fit}"}, value=fit)
            self.width.value, self.height.value = settings.width, settings.height
            self._exact.set_visibility(settings.has_exact_size)
            self._shown = settings
        self._showing = False
        if failure is not self._failure:
            self._failure = failure
            for name, control in self._fields().items():
                words = "" if isinstance(control, ui.number) else "Refused by the server"  # Number fields have no space for text.
                control.error = words if failure is not None and failure.field == name else None

    def _change(self, **settings: object) -> None:
        self._shown = None  # Differs from the session's settings, which may become the former ones again.
        self._report(**settings)

    def _fields(self) -> "dict[str, ValidationElement[Any]]":
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative,
            "strength": self.strength.field,
            "num_inference_steps": self.steps.field,
            "guidance_scale": self.guidance.field,
            "true_cfg_scale": self.true_cfg.field,
            "seed": self.seed,
            "model": self.model,
            "scheduler": self.scheduler,
            "fit": self.fit,
            "image_count": self.count.field,
            "mask_blur": self.mask_blur.field,
            "loras": self.loras.field,
            "fidelity": self.fidelity,
            "width": self.width,
            "height": self.height,
        }

    def _follow(self, model: "ModelInfo | None", given: frozenset[str]) -> None:
        """Shows the controls of the settings that the model takes beside the options `given`."""
        for control in (self.strength, self.steps, self.guidance):
            control.follow(model, given)
        self.true_cfg.follow(model, given, is_usual=False)
        self.negative.set_visibility(model is None or model.takes("negative_prompt"))
        self.scheduler.set_visibility(model is None or model.takes("scheduler"))
        self.fidelity.set_visibility(model is not None and bool(model.speedups))

    def _show_choices(self, settings: Settings) -> None:
        default = next((model.id for model in self._models if model.is_default), None)
        models = {"": "Server's default" if default is None else f"Server's default ({default})"}
        models |= {model.id: _describe(model) for model in self._models if model.family not in COMPANIONS}
        if settings.model and settings.model not in models:
            models[settings.model] = f"{settings.model} · not on the server"
        failed = {model.id for model in self._models if model.state == "failed"}
        indices = [index for index, name in enumerate(models) if name in failed]
        self.model.props[":option-disable"] = f"option => {indices}.includes(option.value)"
        self.model.set_options(models, value=settings.model or "")
        chosen = model_of(settings, self._models)
        known = () if chosen is None else chosen.schedulers
        if settings.scheduler and settings.scheduler not in known:
            known = (*known, settings.scheduler)
        self.scheduler.set_options({"": "Model's default"} | {name: name for name in known}, value=settings.scheduler or "")
        levels = dict(_FIDELITIES)
        if settings.fidelity and settings.fidelity not in levels:
            levels[settings.fidelity] = settings.fidelity
        self.fidelity.set_options(levels, value=settings.fidelity or "")

    def _on_change(self, name: str) -> Callable[[object], None]:
        def on_change(event: object) -> None:
            if not self._showing:
                value = getattr(event, "value", None)
                self._change(**{name: (value or None) if name in _CHOICES else (value or "")})

        return on_change

    def _pixels(self, name: str) -> ui.number:
        field = ui.number(name.capitalize(), step=8, on_change=lambda event: self._take_pixels(name, event.value))
        field.props(f"outlined dense hide-bottom-space no-error-icon data-field={name}")
        return field

    def _take_pixels(self, name: str, value: float | None) -> None:
        if not self._showing:
            self._change(**{name: None if value is None or not math.isfinite(value) else round(value)})

    def _take_fit(self, event: object) -> None:
        if self._showing:
            return
        fit = getattr(event, "value", None) or None
        exact = fit == "exact"
        if exact:
            self._change(fit=None, width=_PIXELS, height=_PIXELS)
        else:
            self._change(fit=fit, width=None, height=None)

    def _take_model(self, event: object) -> None:
        if self._showing:
            return
        model = getattr(event, "value", None) or None
        known = next((info.schedulers for info in self._models if info.id == model), None)
        kept = self.scheduler.value or None
        self._change(model=model, scheduler=kept if known is None or kept in known else None)

    def _take_seed(self, event: object) -> None:
        if self._showing:
            return
        words = str(getattr(event, "value", None) or "")
        self._change(seed=int(words) if words.isdecimal() else None)  # The mask allows digits only.

    def _roll(self) -> None:
        self.seed.value = str(secrets.randbits(_SEED_BITS))


def _describe(model: "ModelInfo") -> str:
    state = _STATES.get(model.state)
    if state is None:
        return model.id
    return f"{model.id} · {state}: {model.detail}" if model.detail else f"{model.id} · {state}"

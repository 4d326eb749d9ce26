"""The image prompts: for each, its image adapter, its images and its scale; and a picker, for models that take them."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

from nicegui import ui

from img2img_playground.components import ImagePicker, thumbnail
from img2img_playground.image_prompts import DEFAULT_SCALE, PromptImages, most_prompt_images, most_prompts
from img2img_playground.images import ImageFile
from img2img_playground.number_control import NumberControl
from img2img_playground.session import Session


@dataclass(frozen=True, slots=True)
class PromptActions:
    """`upload` is where images are PUT, followed by the id of their image prompt; `address` maps an image's id to its address;
    `change` is called with a changed image prompt, `remove` with an image, and `refresh` before a list of adapters opens."""

    upload: str
    address: Callable[[str], str]
    refused: Callable[[str, int], None]
    change: Callable[[PromptImages], None]
    remove: Callable[[ImageFile], None]
    refresh: Callable[[], None]

    def picker(self, prompt_id: str, label: str) -> ImagePicker:
        """Adds a picker for the images of a prompt."""
        return ImagePicker(f"{self.upload}/{prompt_id}", self.refused, label, everywhere=False, multiple=True)


class PromptList:
    """All image prompts of a session."""

    def __init__(self, actions: PromptActions) -> None:
        self._actions = actions
        self._rows: list[_PromptRow] = []
        self._offered: tuple[tuple[str, ...], int] = ((), 0)
        self._new = secrets.token_urlsafe(16)
        with ui.element("div").classes("image-prompts").props('role=group aria-label="Image prompts"') as self._box:
            self._hint = ui.label().classes("control-hint")
            self._list = ui.element("div").classes("control-rows")
            self._picker = actions.picker(self._new, "Add an image prompt")

    def show(self, session: Session) -> None:
        """Shows the session's image prompts if its model takes them, and image adapters fit it."""
        model, most = session.model, most_prompts(session.model)
        prompts = session.extras.prompts[:most]  # others stay, for models that take more
        adapters = () if model is None else model.image_adapters
        self._box.set_visibility(most > 0 and bool(adapters or prompts))
        self._hint.text = f"Image prompts, up to {most}: images whose content and style the result takes over"
        self._picker.set_visibility(len(prompts) < most and bool(adapters))
        if self._new in [prompt.id for prompt in prompts]:
            self._new = secrets.token_urlsafe(16)
            self._picker.send_to(f"{self._actions.upload}/{self._new}")
        offered = (adapters, most_prompt_images(model))
        shown = [(row.prompt.id, row.prompt.images) for row in self._rows]
        if offered != self._offered or shown != [(prompt.id, prompt.images) for prompt in prompts]:
            self._offered = offered
            self._list.clear()
            with self._list:
                self._rows = [_PromptRow(self._actions, prompt, at, *offered) for at, prompt in enumerate(prompts, start=1)]
        wrong = None if session.failure is None else session.failure.index("image_prompts")
        for index, (row, prompt) in enumerate(zip(self._rows, prompts, strict=True)):
            row.show(prompt, is_wrong=wrong in (index, -1))


class _PromptRow:
    """The `number`-th image prompt: its adapter, one of `adapters`, its images, at most `most`, and its scale."""

    def __init__(self, actions: PromptActions, prompt: PromptImages, number: int, adapters: tuple[str, ...], most: int) -> None:
        self.prompt, self._report, self._showing = prompt, actions.change, False
        group = ui.element("div").classes("control-row").props("role=group")
        group.props["aria-label"] = f"Image prompt {number}"
        with group:
            known = list(dict.fromkeys((*adapters, prompt.adapter)))
            self.adapter = ui.select(known, label="Image adapter", value=prompt.adapter, on_change=self._choose)
            self.adapter.props("outlined dense hide-bottom-space data-field=image_prompts popup-content-class=menu").on(
                "popup-show", actions.refresh
            )
            with ui.element("div").classes("reference-row"):
                for image in prompt.images:
                    thumbnail(image, actions.address, actions.remove)
            if len(prompt.images) < most:
                actions.picker(prompt.id, "Add an image")
            hint = "How closely to follow the images"
            self.scale = NumberControl("scale", "Scale", hint, 0, 2, 0.05, self._set_scale)
            self.scale.show(prompt.scale)

    def show(self, prompt: PromptImages, *, is_wrong: bool) -> None:
        """Shows the settings of a prompt with the same images, and marks them if the server refused them."""
        if prompt != self.prompt:
            self.prompt, self._showing = prompt, True
            if prompt.adapter not in self.adapter.options:
                self.adapter.set_options([*self.adapter.options, prompt.adapter])
            self.adapter.value = prompt.adapter
            self.scale.show(prompt.scale)
            self._showing = False
        self.adapter.error = "Refused by the server" if is_wrong else None

    def _choose(self, event: object) -> None:
        if not self._showing:
            self._set(adapter=str(getattr(event, "value", None) or ""))

    def _set_scale(self, scale: float | None) -> None:
        self._set(scale=DEFAULT_SCALE if scale is None else scale)

    def _set(self, **values: object) -> None:
        self.prompt = replace(self.prompt, **values)  # type: ignore[arg-type]
        self._report(self.prompt)

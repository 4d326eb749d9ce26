"""The state of one browser tab: source, settings, current run and history, isolated from other tabs."""

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from img2img_client.errors import Img2ImgError
from img2img_client.values import Completed, Progress, Queued, Started, TransformEvent, TransformResult

from img2img_playground.extras import NO_EXTRAS, ControlImage, Extras, most_controls, most_references, names_controlnets
from img2img_playground.failures import Failure, explain
from img2img_playground.history import Entry, History
from img2img_playground.image_prompts import PromptImages, most_prompt_images, most_prompts
from img2img_playground.images import ImageFile, UnusableImage, read_image, read_settings, reduce
from img2img_playground.settings import Settings

if TYPE_CHECKING:
    from img2img_client.async_client import AsyncClient
    from img2img_client.retry import OnRetry
    from img2img_client.values import ModelInfo

Phase = Literal["sending", "queued", "running", "waiting"]
"""The phase of a run: being sent, in the server's queue, running, or waiting for a retry."""


_LONGEST_STEM = 60
"""Maximum characters of the stem in a result's name, which grows if results become sources."""


@dataclass(frozen=True, slots=True)
class Run:
    """The progress of a run. `position` is the number of requests ahead in the queue; `eta` is in seconds, None if unknown;
    `preview` is the latest preview (JPEG); `problem` is the reason for a retry, in `eta` seconds."""

    source: ImageFile
    settings: Settings
    extras: Extras = NO_EXTRAS
    phase: Phase = "sending"
    position: int = 0
    step: int = 0
    step_count: int = 0
    eta: float | None = None
    preview: bytes | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Notice:
    """An informational message. `undo` has the previous settings if the message is about changed settings."""

    text: str
    undo: Settings | None = None


class Session:
    """The state of a tab. Must be used on the event loop only.

    `model` is the server's description of the model that the settings choose, None if it is not known, and `controlnets` are the
    ids of the ControlNets that fit it.
    `open_client` creates the tab's client, which reports retries to its argument. Listeners are called after each change.
    """

    def __init__(self, open_client: "Callable[[OnRetry], AsyncClient]", target: str) -> None:
        self.key = secrets.token_urlsafe(16)
        self.settings = Settings()
        self.model: ModelInfo | None = None
        self.controlnets: tuple[str, ...] = ()
        self.source: ImageFile | None = None
        self.extras = NO_EXTRAS
        self.run: Run | None = None
        self.shown: Entry | None = None
        self.failure: Failure | None = None
        self.notice: Notice | None = None
        self.history = History()
        self.listeners: list[Callable[[], None]] = []
        self._target = target
        self._client = open_client(self._on_retry)
        self._task: asyncio.Task[None] | None = None

    async def upload(self, data: bytes, name: str) -> None:
        """Makes a file the source; shows a failure if it cannot be used. Takes over the settings that the file records."""
        try:
            original = read_image(data, name)
            image = await asyncio.to_thread(reduce, original)
        except UnusableImage as error:
            self.fail(Failure("The image cannot be used.", str(error), "image"))
            return
        self.use(image)
        if image is not original:
            sizes = f"from {original.width} x {original.height} to {image.width} x {image.height} pixels"
            self._notify(Notice(f"{original.name} was too large for servers, and was reduced {sizes}."))
        try:
            recorded = await asyncio.to_thread(read_settings, data)
        except ValueError as error:
            self._notify(Notice(f"The settings in {image.name} cannot be used: {error}"))
        else:
            if recorded is not None:
                self.restore(recorded, f"Settings restored from {image.name}.")

    def use(self, image: ImageFile) -> None:
        """Makes an image the source of the next run."""
        self.source, self.shown, self.failure, self.notice = image, None, None, None
        self.extras = replace(self.extras, mask=None)
        self._changed()

    def set_mask(self, data: bytes) -> None:
        """Makes a file the mask, or removes the mask if it is empty; shows a failure if it cannot be used."""
        if self.source is None:
            return
        try:
            mask = read_image(data, f"{self.source.stem[:_LONGEST_STEM]}-mask.png") if data else None
        except UnusableImage as error:
            self.fail(Failure("The mask cannot be used.", str(error), "mask"))
            return
        self.extras = replace(self.extras, mask=mask)
        self._clear_failure("mask")

    def add_reference(self, data: bytes, name: str) -> None:
        """Adds a file to the references; shows a failure if it cannot be used."""
        image = self._read(data, name, "a reference", "reference_images")
        if image is None:
            return
        if len(self.extras.references) < self.most_references:
            self.extras = replace(self.extras, references=(*self.extras.references, image))
            self._clear_failure("reference_images")

    @property
    def most_references(self) -> int:
        """The maximum number of references that the model takes now."""
        return most_references(self.model, self.fitted_extras.mask is not None)

    @property
    def fitted_extras(self) -> Extras:
        """The images that the model takes."""
        return self.extras.fitted(self.model, self.controlnets)

    def remove_reference(self, image: ImageFile) -> None:
        """Removes one of the references."""
        self.extras = replace(self.extras, references=tuple(kept for kept in self.extras.references if kept is not image))
        self._clear_failure("reference_images")

    def add_control(self, data: bytes, name: str) -> None:
        """Adds a file to the control images, for the ControlNet of the last one or the first that fits, or for the model itself;
        shows a failure if it cannot be used."""
        image = self._read(data, name, "a control image", "controls")
        if image is None:
            return
        controls = self.extras.controls
        known = ("",) if not names_controlnets(self.model) else (*(one.model for one in controls[-1:]), *self.controlnets)
        if len(controls) < most_controls(self.model) and known:
            self.extras = replace(self.extras, controls=(*controls, ControlImage(image, known[0])))
            self._clear_failure("controls")

    def change_control(self, control: ControlImage) -> None:
        """Replaces the control of the same image. Listeners are called only to remove a failure, since the change comes from the
        page."""
        controls = tuple(control if one.image is control.image else one for one in self.extras.controls)
        self.extras = replace(self.extras, controls=controls)
        if self.failure is not None and self.failure.field == "controls":
            self._clear_failure("controls")

    def remove_control(self, image: ImageFile) -> None:
        """Removes the control of an image."""
        self.extras = replace(self.extras, controls=tuple(one for one in self.extras.controls if one.image is not image))
        self._clear_failure("controls")

    def add_prompt_image(self, data: bytes, name: str, prompt_id: str) -> None:
        """Adds a file to the image prompt with this id, or to a new one, for the adapter of the last one or the first that fits;
        shows a failure if it cannot be used."""
        image = self._read(data, name, "an image prompt", "image_prompts")
        if image is None:
            return
        prompts, most = self.extras.prompts, most_prompt_images(self.model)
        found = next((one for one in prompts if one.id == prompt_id), None)
        if found is not None and len(found.images) >= most:
            self.fail(Failure(f"{image.name} was not added.", f"An image prompt has at most {most} images.", "image_prompts"))
            return
        if found is not None:
            self._set_prompt(replace(found, images=(*found.images, image)))
        elif self.model is not None and self.model.image_adapters and len(prompts) < most_prompts(self.model):
            adapters = self.model.image_adapters
            last = prompts[-1].adapter if prompts else ""
            new = PromptImages(prompt_id, last if last in adapters else adapters[0], (image,))
            self.extras = replace(self.extras, prompts=(*prompts, new))
        self._clear_failure("image_prompts")

    def change_prompt(self, prompt: PromptImages) -> None:
        """Replaces the image prompt with the same id. Listeners are called only to remove a failure, since the change comes from
        the page."""
        self._set_prompt(prompt)
        if self.failure is not None and self.failure.field == "image_prompts":
            self._clear_failure("image_prompts")

    def remove_prompt_image(self, image: ImageFile) -> None:
        """Removes an image from its image prompt, and the prompt with its last image."""
        kept = (replace(one, images=tuple(has for has in one.images if has is not image)) for one in self.extras.prompts)
        self.extras = replace(self.extras, prompts=tuple(one for one in kept if one.images))
        self._clear_failure("image_prompts")

    def _set_prompt(self, prompt: PromptImages) -> None:
        prompts = tuple(prompt if one.id == prompt.id else one for one in self.extras.prompts)
        self.extras = replace(self.extras, prompts=prompts)

    def _read(self, data: bytes, name: str, what: str, field: str) -> ImageFile | None:
        """A file's image; shows a failure and returns None if it cannot be used as `what` in this field of a request."""
        try:
            return read_image(data, name)
        except UnusableImage as error:
            self.fail(Failure(f"The image cannot be used as {what}.", str(error), field))
            return None

    def _clear_failure(self, field: str) -> None:
        if self.failure is not None and self.failure.field == field:
            self.failure = None
        self._changed()

    def restore(self, settings: Settings, text: str) -> None:
        """Replaces the settings, with a notice whose undo brings the present ones back."""
        self.settings, before = settings, self.settings
        self.failure = None
        self._notify(Notice(text, before))

    def undo(self) -> None:
        """Brings the settings from before the notice back."""
        if self.notice is not None and self.notice.undo is not None:
            self.settings = self.notice.undo
        self.dismiss()

    def dismiss(self) -> None:
        """Removes the failure and the notice."""
        self.failure = self.notice = None
        self._changed()

    def reconnected(self) -> None:
        """Removes a failure whose cause was that the server could not be reached."""
        if self.failure is not None and self.failure.disconnected:
            self.dismiss()

    def fail(self, failure: Failure) -> None:
        """Shows a failure."""
        self.failure = failure
        self._changed()

    def set(self, **settings: object) -> None:
        """Changes settings, by the names of Settings. Removes a failure of one of them. Otherwise listeners are not called, since
        the change comes from the page."""
        self.settings = replace(self.settings, **settings)  # type: ignore[arg-type]
        if self.failure is not None and self.failure.field in settings:
            self.failure = None
            self._changed()

    def recall(self, entry: Entry) -> None:
        """Restores an entry of the history: its source, settings and result."""
        self.source, self.settings, self.extras, self.shown = entry.source, entry.settings, entry.extras, entry
        self.dismiss()

    def clear_history(self) -> None:
        """Clears the history; the entry on the stage stays."""
        self.history.clear()
        self._changed()

    def image(self, image_id: str) -> ImageFile | None:
        """The image of this tab with this id, or None."""
        shown = self.shown.images if self.shown is not None else ()
        images = (self.source, self.run.source if self.run is not None else None, *self.extras.images, *shown)
        return next((image for image in images if image is not None and image.id == image_id), None) or (
            self.history.image(image_id)
        )

    def start(self) -> None:
        """Starts a run with the current source and settings. Does nothing during a run."""
        if self.run is not None:
            return
        if self.source is None:
            self.fail(Failure("There is no image yet.", "Drop an image on the page, paste one, or choose a file.", "image"))
            return
        self.failure = self.notice = None
        settings, extras = self.fitted()
        self.run = Run(self.source, settings, extras)
        self._task = asyncio.create_task(self._transform(self.run.source, settings, extras))
        self._task.add_done_callback(self._over)  # Also runs if the task is cancelled before it starts
        self._changed()

    def fitted(self) -> tuple[Settings, Extras]:
        """The settings and images that the model takes."""
        extras = self.fitted_extras
        settings = self.settings.fitted(self.model, extras.given)
        return replace(settings, mask_blur=settings.mask_blur if extras.mask is not None else None), extras

    def cancel(self) -> None:
        """Cancels the run; the server stops at its next step."""
        if self._task is not None:
            self._task.cancel()

    async def close(self) -> None:
        """Cancels the run and releases everything."""
        self.listeners.clear()
        task = self._task
        if task is not None:
            self.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._client.close()
        self.history.clear()
        self.source = self.shown = None
        self.extras = NO_EXTRAS

    async def _transform(self, source: ImageFile, settings: Settings, extras: Extras) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        options = settings.options() | extras.options()
        options["preview_interval"] = settings.preview_interval(self.model, extras.given)
        try:
            async with self._client.transform_stream(source.data, **options) as events:
                async for event in events:
                    if isinstance(event, Completed):
                        self._finish(event.result, Run(source, settings, extras), loop.time() - began)
                    else:
                        self._follow(event)
        except Img2ImgError as error:
            self.failure = explain(error, self._target)
        except ValueError as error:  # A number that the contract cannot represent
            self.failure = Failure("The request cannot be sent.", str(error))

    def _over(self, task: asyncio.Task[None]) -> None:
        self.run = self._task = None
        self._changed()

    def _follow(self, event: TransformEvent) -> None:
        assert self.run is not None, "events arrive during a run"
        match event:
            case Queued(position, eta):
                self.run = replace(self.run, phase="queued", position=position, eta=eta)
            case Started():
                self.run = replace(self.run, phase="running")
            case Progress(step, count, preview, eta):
                preview = self.run.preview if preview is None else preview
                self.run = replace(self.run, phase="running", step=step, step_count=count, preview=preview, eta=eta)
        self._changed()

    def _finish(self, result: TransformResult, run: Run, seconds: float) -> None:
        source = run.source
        for image in reversed(result.images):  # The first one is the newest.
            name = f"{source.stem[:_LONGEST_STEM]}-{image.seed}.{image.format}"
            output = ImageFile(name, f"image/{image.format}", image.width, image.height, image.data)
            made = replace(run.settings, seed=image.seed, image_count=1)
            entry = Entry(source, made, output, result.model_id, result.engine, seconds, result.warnings, run.extras)
            self.history.add(entry)
            if self.source is source:  # Else another image was uploaded meanwhile, which stays on the stage.
                self.shown = entry

    def _on_retry(self, attempt: int, error: Img2ImgError, wait: float) -> None:
        if self.run is not None:
            self.run = replace(self.run, phase="waiting", problem=explain(error, self._target).title, eta=wait)
            self._changed()

    def _notify(self, notice: Notice) -> None:
        self.notice = notice
        self._changed()

    def _changed(self) -> None:
        for listener in tuple(self.listeners):
            listener()

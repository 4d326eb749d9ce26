"""What one tab of a browser has: its image, settings, the run that is on, and its history. No other tab sees any of it."""

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from img2img_client.errors import Img2ImgError
from img2img_client.values import Completed, Progress, Queued, Started, TransformEvent, TransformResult

from img2img_playground.failures import Failure, explain
from img2img_playground.history import Entry, History
from img2img_playground.pictures import Picture, UnusablePicture, read_picture
from img2img_playground.settings import Settings

if TYPE_CHECKING:
    from img2img_client.async_client import AsyncClient
    from img2img_client.retry import OnRetry

Phase = Literal["sending", "queued", "running", "waiting"]
"""Of a run: on its way, in the server's queue, being computed, or about to be tried again."""


_LONGEST_STEM = 60
"""Of a result's name: one that becomes a source, and so on, is named after all of them."""


@dataclass(frozen=True, slots=True)
class Run:
    """How far the run is. `position` counts those before it in the queue; `eta` is in seconds, None where nobody knows;
    `preview` is the latest one's JPEG file; `problem` says why it is tried again, in `eta` seconds."""

    source: Picture
    settings: Settings
    phase: Phase = "sending"
    position: int = 0
    step: int = 0
    step_count: int = 0
    eta: float | None = None
    preview: bytes | None = None
    problem: str = ""


class Session:
    """The state of a tab. Lives on the event loop, as everything that uses it does.

    `open_client` makes the client of this tab alone, whose retries are told to what it is given. Listeners are called after
    each change.
    """

    def __init__(self, open_client: "Callable[[OnRetry], AsyncClient]", target: str) -> None:
        self.key = secrets.token_urlsafe(16)
        self.settings = Settings()
        self.source: Picture | None = None
        self.run: Run | None = None
        self.shown: Entry | None = None
        self.failure: Failure | None = None
        self.history = History()
        self.listeners: list[Callable[[], None]] = []
        self._target = target
        self._client = open_client(self._on_retry)
        self._task: asyncio.Task[None] | None = None

    def bring(self, data: bytes, name: str) -> None:
        """Takes a file as the source. What is wrong with it becomes the failure that is shown."""
        try:
            self.use(read_picture(data, name))
        except UnusablePicture as error:
            self.fail(Failure("That picture cannot be used.", str(error), "image"))

    def use(self, picture: Picture) -> None:
        """Makes an image the source of the next run."""
        self.source, self.shown, self.failure = picture, None, None
        self._changed()

    def fail(self, failure: Failure) -> None:
        """Shows what went wrong."""
        self.failure = failure
        self._changed()

    def set(self, **settings: object) -> None:
        """Changes settings, by Settings' names. Nobody is told: it comes from who shows them."""
        self.settings = replace(self.settings, **settings)  # type: ignore[arg-type]

    def recall(self, entry: Entry) -> None:
        """Brings back an entry of the history: its source, its settings and its result."""
        self.source, self.settings, self.shown, self.failure = entry.source, entry.settings, entry, None
        self._changed()

    def clear_history(self) -> None:
        """Forgets what was made, but what is shown."""
        self.history.clear()
        self._changed()

    def picture(self, picture_id: str) -> Picture | None:
        """An image of this tab by its id."""
        shown = (self.shown.source, self.shown.result) if self.shown is not None else ()
        here = (self.source, self.run.source if self.run is not None else None, *shown)
        return next((picture for picture in here if picture is not None and picture.id == picture_id), None) or (
            self.history.picture(picture_id)
        )

    def start(self) -> None:
        """Begins a run of the source and settings as they are. One at a time: while one is on, nothing happens."""
        if self.run is not None:
            return
        if self.source is None:
            self.fail(Failure("There is no picture yet.", "Drop one on the page, paste one, or choose a file.", "image"))
            return
        self.failure = None
        self.run = Run(self.source, self.settings)
        self._task = asyncio.create_task(self._transform(self.run.source, self.run.settings))
        self._task.add_done_callback(self._over)  # Also of one that is cancelled before its first line
        self._changed()

    def cancel(self) -> None:
        """Ends the run that is on; the server stops at its next step."""
        if self._task is not None:
            self._task.cancel()

    async def close(self) -> None:
        """Cancels what runs and lets go of everything."""
        self.listeners.clear()
        task = self._task
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._client.close()
        self.history.clear()
        self.source = self.shown = None

    async def _transform(self, source: Picture, settings: Settings) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        options = settings.options()
        options["preview_interval"] = settings.preview_interval
        try:
            async with self._client.transform_stream(source.data, **options) as events:
                async for event in events:
                    if isinstance(event, Completed):
                        self._finish(event.result, source, settings, loop.time() - began)
                    else:
                        self._follow(event)
        except Img2ImgError as error:
            self.failure = explain(error, self._target)
        except ValueError as error:  # A number that the contract cannot express
            self.failure = Failure("That cannot be sent.", str(error))

    def _over(self, task: asyncio.Task[None]) -> None:
        self.run = self._task = None
        self._changed()

    def _follow(self, event: TransformEvent) -> None:
        assert self.run is not None, "events come while a run is on"
        match event:
            case Queued(position, eta):
                self.run = replace(self.run, phase="queued", position=position, eta=eta)
            case Started():
                self.run = replace(self.run, phase="running")
            case Progress(step, count, preview, eta):
                preview = self.run.preview if preview is None else preview
                self.run = replace(self.run, phase="running", step=step, step_count=count, preview=preview, eta=eta)
        self._changed()

    def _finish(self, result: TransformResult, source: Picture, settings: Settings, seconds: float) -> None:
        image = result.images[0]
        name = f"{source.stem[:_LONGEST_STEM]}-{image.seed}.{image.format}"
        picture = Picture(name, f"image/{image.format}", image.width, image.height, image.data)
        settings = replace(settings, seed=image.seed)
        entry = Entry(source, settings, picture, result.model_id, result.engine, seconds, result.warnings)
        self.history.add(entry)
        if self.source is source:  # Else another image was brought meanwhile, which stays in sight.
            self.shown = entry

    def _on_retry(self, attempt: int, error: Img2ImgError, wait: float) -> None:
        if self.run is not None:
            self.run = replace(self.run, phase="waiting", problem=explain(error, self._target).title, eta=wait)
            self._changed()

    def _changed(self) -> None:
        for listener in tuple(self.listeners):
            listener()

"""Residency: which models are in memory, who uses them, and who has to leave when there is no room."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from img2img_server.bundle import Source
from img2img_server.config import ModelSettings
from img2img_server.engine.engine import Engine
from img2img_server.errors import NotSupported
from img2img_server.models import Model, ModelStore


class Residency:
    """Loads and unloads the models of `models`, on threads of its own, while `engine` runs the others.

    `health` is told the id of each model that can or can no longer be served. Used on the event loop only.
    """

    def __init__(
        self,
        settings: ModelSettings,
        models: ModelStore,
        engine: Engine,
        health: Callable[[str, bool], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._models = models
        self._engine = engine
        self._health = health

    @asynccontextmanager
    async def using(self, reference: Source) -> AsyncIterator[Model]:
        """Within the block the model that `reference` means is in memory and stays there; it is loaded first where that is
        allowed."""
        yield self._models.resolve(reference)

    async def load(self, reference: Source) -> Model:
        """Makes a model ready, and returns it."""
        raise NotSupported("models are loaded when the server starts")

    async def unload(self, name: str) -> int:
        """Waits until nobody uses the model `name`, frees its memory, and returns how many bytes that gave back."""
        raise NotSupported("models are unloaded when the server stops")

    async def close(self) -> None:
        """Ends what is being loaded or exported."""

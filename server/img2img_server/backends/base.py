"""The interface of a backend, which runs requests: an engine in this process, or replicas of a cluster."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from img2img_server.bundle.manifest import Source
from img2img_server.engine.cache import Cache
from img2img_server.engine.interface import EngineInterface, Span
from img2img_server.errors import ServerError
from img2img_server.models.registry import Model, ModelRegistry
from img2img_server.models.residency import Health


class Models(Protocol):
    """Access to models: the Residency of this process, or that of a cluster."""

    def using(self, reference: Source) -> AbstractAsyncContextManager[Model]:
        """Keeps the model of `reference` usable within the block. Raises ServerError if the caller cannot use it."""
        ...

    async def open_control(self, name: str) -> None:
        """Opens the control graph of the model `name`, which the caller uses, if requests run in this process. Raises
        ServerError."""
        ...

    async def load(self, reference: Source) -> Model:
        """Loads a model and returns it."""
        ...

    async def unload(self, name: str) -> int:
        """Frees the memory of the model `name`. Returns the freed bytes."""
        ...


class Backend(Protocol):
    """Runs requests. The methods are called in this order; the properties are available after `open`."""

    @property
    def models(self) -> ModelRegistry:
        """The known models."""
        ...

    @property
    def runner(self) -> EngineInterface:
        """Accepts requests."""
        ...

    @property
    def residency(self) -> Models:
        """Loads and unloads models."""
        ...

    @property
    def cache(self) -> Cache | None:
        """The cache of encoded inputs, None if it is not in this process."""
        ...

    async def open(self, health: Health, observe: Callable[[Span], None]) -> None:
        """Prepares to run requests. Calls `health` when a model becomes available or unavailable, and `observe` for each stage
        that runs in this process. Raises BundleError, OSError or ValueError on failure."""
        ...

    async def start(self, stuck: Callable[[str], Awaitable[None]]) -> None:
        """Starts to run requests. Calls `stuck` with a line of explanation if none can be run any more."""
        ...

    async def drain(self, grace: float) -> None:
        """Refuses new requests, waits up to `grace` seconds for running ones, and ends the rest."""
        ...

    async def abandon(self, error: ServerError) -> None:
        """Ends every request with `error` at once. No request can be run afterwards."""
        ...

    async def close(self) -> None:
        """Releases all resources, after all responses were sent. Does nothing if it was never opened."""
        ...

    def close_now(self) -> None:
        """Replaces `close` if the process ends at once: only completes files."""
        ...

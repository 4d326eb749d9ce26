"""Polls the server's state once for all tabs, only while there are tabs."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from img2img_client.errors import Img2ImgError

from img2img_playground.failures import Failure, explain

if TYPE_CHECKING:
    from img2img_client.async_client import AsyncClient
    from img2img_client.values import ModelInfo

_INTERVAL = 3.0
"""Seconds between polls."""
_TIMEOUT = 5.0
"""Timeout of a poll in seconds."""


@dataclass(frozen=True, slots=True)
class ServerState:
    """The server's state. `problem` is why it is not usable, or None; `models` are the last known ones. `known` is False
    before the first poll."""

    known: bool = False
    problem: Failure | None = None
    models: "tuple[ModelInfo, ...]" = ()


class ServerWatch:
    """Polls the server with `client`, which does not retry, and calls listeners after changes."""

    def __init__(self, client: "AsyncClient", target: str) -> None:
        self.target = target
        self.state = ServerState()
        self._client = client
        self._listeners: list[Callable[[], None]] = []
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def listen(self, listener: Callable[[], None]) -> None:
        """Adds a listener, which is called after each change; the first one starts the polling."""
        self._listeners.append(listener)
        self._wanted.set()
        if self._task is None:
            self._task = asyncio.create_task(self._poll())

    def forget(self, listener: Callable[[], None]) -> None:
        """Removes a listener, if present; polling pauses without listeners."""
        if listener in self._listeners:
            self._listeners.remove(listener)
        if not self._listeners:
            self._wanted.clear()

    async def close(self) -> None:
        """Stops polling."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._client.close()

    async def _poll(self) -> None:
        while True:
            await self._wanted.wait()
            state = await self._ask()
            if state != self.state:
                self.state = state
                for listener in tuple(self._listeners):
                    listener()
            await asyncio.sleep(_INTERVAL)

    async def _ask(self) -> ServerState:
        try:
            return ServerState(True, None, await self._client.models(timeout=_TIMEOUT))
        except Img2ImgError as error:
            return ServerState(True, explain(error, self.target), self.state.models)

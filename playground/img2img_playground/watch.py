"""Whether the server is there and what it has: asked once for all tabs, and only while there are any."""

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
"""Seconds between two looks; also the most that a change stays unseen."""
_PATIENCE = 5.0
"""Seconds that the server has for an answer."""


@dataclass(frozen=True, slots=True)
class ServerState:
    """What is known of the server. `problem` says why it is not usable, None where it is; `models` are the last that were heard
    of. `known` is False until the first look."""

    known: bool = False
    problem: Failure | None = None
    models: "tuple[ModelInfo, ...]" = ()


class ServerWatch:
    """Looks at the server by `client`, which does not retry, and tells listeners when something has changed."""

    def __init__(self, client: "AsyncClient", target: str) -> None:
        self.target = target
        self.state = ServerState()
        self._client = client
        self._listeners: list[Callable[[], None]] = []
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def listen(self, listener: Callable[[], None]) -> None:
        """Calls it after each change; the first listener begins the looking."""
        self._listeners.append(listener)
        self._wanted.set()
        if self._task is None:
            self._task = asyncio.create_task(self._look())

    def forget(self, listener: Callable[[], None]) -> None:
        """Calls it no more; without listeners nobody looks. Harmless where it was forgotten before."""
        if listener in self._listeners:
            self._listeners.remove(listener)
        if not self._listeners:
            self._wanted.clear()

    async def close(self) -> None:
        """Stops looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._client.close()

    async def _look(self) -> None:
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
            return ServerState(True, None, await self._client.models(timeout=_PATIENCE))
        except Img2ImgError as error:
            return ServerState(True, explain(error, self.target), self.state.models)

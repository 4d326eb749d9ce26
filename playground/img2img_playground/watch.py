"""Follows the server's state once for all tabs, only while there are tabs: a health watch says when to ask for the models."""

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from img2img_client.errors import Img2ImgError

from img2img_playground.failures import Failure, explain

if TYPE_CHECKING:
    from img2img_client.async_client import AsyncClient
    from img2img_client.values import ModelInfo

_PAUSE = 1.0
"""Seconds between a broken health watch and the next."""
_WHILE_LOADING = 2.0
"""Seconds between questions while a model is loading. Otherwise the models are asked for only after a change."""
_TIMEOUT = 5.0
"""Timeout of a question in seconds."""
_NOT_READY = Failure("The server is not ready.", "It is starting or stopping.", may_pass=True)


_CONTROLNET = "controlnet"
COMPANIONS = (_CONTROLNET, "image-encoder")
"""The families of models that only requests to other models use."""


@dataclass(frozen=True, slots=True)
class ServerState:
    """The server's state. `problem` is why it is not usable, or None; `models` are the last known ones. `known` is False
    before the first answer."""

    known: bool = False
    problem: Failure | None = None
    models: "tuple[ModelInfo, ...]" = ()
    loras: tuple[str, ...] = ()
    """The ids of the LoRAs, if a model takes some."""

    @property
    def controlnets(self) -> tuple[str, ...]:
        """The ids of the ControlNets that did not fail."""
        return tuple(model.id for model in self.models if model.family == _CONTROLNET and model.state != "failed")


class ServerWatch:
    """Follows the server with `client`, which does not retry, and calls listeners after changes.

    The models are asked for when the server's health changes, when a page calls `refresh`, and while one is loading.
    """

    def __init__(self, client: "AsyncClient", target: str) -> None:
        self.target = target
        self.state = ServerState()
        self._client = client
        self._listeners: list[Callable[[], None]] = []
        self._serving = True
        self._stale = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def listen(self, listener: Callable[[], None]) -> None:
        """Adds a listener, which is called after each change; the first one starts the watch."""
        self._listeners.append(listener)
        if not self._tasks:
            self._tasks = [asyncio.create_task(work()) for work in (self._follow_health, self._follow_models)]

    def forget(self, listener: Callable[[], None]) -> None:
        """Removes a listener, if present; the last one ends the watch."""
        if listener in self._listeners:
            self._listeners.remove(listener)
        if not self._listeners:
            self._stop()

    def refresh(self) -> None:
        """Asks for the models again."""
        self._stale.set()

    async def close(self) -> None:
        """Ends the watch."""
        await asyncio.gather(*self._stop(), return_exceptions=True)
        await self._client.close()

    def _stop(self) -> list[asyncio.Task[None]]:
        stopped, self._tasks = self._tasks, []
        for task in stopped:
            task.cancel()
        return stopped

    async def _follow_health(self) -> None:
        while True:
            with contextlib.suppress(Img2ImgError):  # The next request for the models reports the problem.
                async with aclosing(self._client.watch_health()) as changes:
                    async for serving in changes:
                        self._serving = serving
                        self._stale.set()
            self._stale.set()
            await asyncio.sleep(_PAUSE)

    async def _follow_models(self) -> None:
        while True:
            self._stale.clear()
            state = await self._ask()
            if state != self.state:
                self.state = state
                for listener in tuple(self._listeners):
                    listener()
            loading = any(model.state == "loading" for model in state.models)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stale.wait(), _WHILE_LOADING if loading else None)

    async def _ask(self) -> ServerState:
        try:
            models = await self._client.models(timeout=_TIMEOUT)
            takes_loras = any(model.field("loras") for model in models)
            loras = await self._client.loras(timeout=_TIMEOUT) if takes_loras else ()
        except Img2ImgError as error:
            return replace(self.state, known=True, problem=explain(error, self.target))
        return ServerState(True, None if self._serving else _NOT_READY, models, tuple(lora.id for lora in loras))

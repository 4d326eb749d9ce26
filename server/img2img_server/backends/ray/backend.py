"""A server's backend whose engines run elsewhere: `img2img serve --engine ray`."""

import logging
import os
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import Protocol

from img2img_server.backends.base import LocalBackend
from img2img_server.backends.local import local
from img2img_server.backends.ray.front import Front
from img2img_server.backends.ray.messages import Replicas
from img2img_server.backends.ray.resources import MESSAGES
from img2img_server.backends.ray.roster import RemoteModels, Roster
from img2img_server.config import ServerConfig
from img2img_server.engine.cache import Cache
from img2img_server.engine.interface import Span
from img2img_server.errors import BundleError, ServerError, ShuttingDown
from img2img_server.models.registry import ModelRegistry
from img2img_server.models.residency import Health
from img2img_server.support.distribution import install_hint

_log = logging.getLogger(__name__)

_NEEDED = ("ray", "starlette", "fastapi")
"""Ray itself, and what Ray Serve needs beside it. To look for ray.serve would import ray, which takes seconds."""
INSTALL = f"the engine 'ray' needs Ray Serve, which is not installed: {install_hint('ray')}"


class Connection(Protocol):
    """How a front reaches its replicas, which are begun where nobody did that before."""

    async def open(self) -> Replicas:
        """Connects, and returns once a replica is ready. Raises OSError where that cannot be done."""
        ...

    async def close(self) -> None:
        """Lets go. Replicas that nobody else may use are ended. Harmless where it was never opened."""
        ...


class ClusterBackend:
    """The replicas of an application, behind one of its fronts. See Backend for what the methods are for."""

    def __init__(self, config: ServerConfig, connection: Connection) -> None:
        self._config = config
        self._connection = connection
        self._roster: Roster | None = None
        self._front: Front | None = None
        self._models: RemoteModels | None = None

    @property
    def models(self) -> ModelRegistry:
        """The models of all replicas."""
        assert self._roster is not None, "it was opened"
        return self._roster.models

    @property
    def runner(self) -> Front:
        """What sends requests to replicas."""
        assert self._front is not None, "it was opened"
        return self._front

    @property
    def residency(self) -> RemoteModels:
        """What asks the replicas for models."""
        assert self._models is not None, "it was opened"
        return self._models

    @property
    def cache(self) -> Cache | None:
        """None: each replica has its own."""
        return None

    async def open(self, health: Health, observe: Callable[[Span], None]) -> None:
        """Connects, and looks at the replicas for the first time. Of stages nothing can be observed from here."""
        replicas = await self._connection.open()
        roster = Roster(replicas, health)
        try:
            await roster.open(self._config.default_model)
        except ServerError as error:
            raise BundleError(str(error)) from error
        self._roster = roster
        self._front = Front(replicas, roster, self._config.limits)
        self._models = RemoteModels(replicas, roster)

    async def start(self, stuck: Callable[[str], Awaitable[None]]) -> None:
        """Looks at the replicas from now on. A replica that is stuck is replaced; the front never is."""
        assert self._roster is not None, "it was opened"
        await self._roster.look()
        self._roster.start(self.runner.looked)

    async def drain(self, grace: float) -> None:
        """Waits for this front's requests; others go on. What becomes of models meanwhile is no news any more."""
        if self._roster is not None:
            await self._roster.close()
        finished = await self.runner.drain(grace)
        _log.info("drained" if finished else "the grace period is over: ending what still runs")
        await self.runner.abandon(ShuttingDown("the server stopped before the request was finished"))

    async def abandon(self, error: ServerError) -> None:
        """Ends this front's requests at once."""
        await self.runner.abandon(error)

    async def close(self) -> None:
        """Lets go of the replicas."""
        if self._roster is not None:
            await self._roster.close()
        await self._connection.close()

    def close_now(self) -> None:
        """Nothing is written here."""


class RayConnection:
    """Deploys, or joins, the application that `config` names on a Ray cluster. `make` gives each replica its engine."""

    def __init__(self, config: ServerConfig, make: Callable[[ServerConfig], LocalBackend] = local) -> None:
        # Read when ray is imported. Its handler would write a trace of every SIGTERM, which only asks us to drain; and what asks
        # for anything after it was shut down would start another cluster.
        os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
        os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
        os.environ.update(MESSAGES)
        from img2img_server.backends.ray.deployment import Deployment

        self._deployment = Deployment(config, make)

    async def open(self) -> Replicas:
        """The replicas behind the deployment's handle."""
        from img2img_server.backends.ray.client import RayReplicas

        return RayReplicas(await self._deployment.open())

    async def close(self) -> None:
        """Ends the application where it is this front's."""
        await self._deployment.close()


def cluster(config: ServerConfig) -> ClusterBackend:
    """A backend of Ray Serve's replicas. Raises ValueError where Ray is not installed, or a setting needs a local engine."""
    if any(find_spec(name) is None for name in _NEEDED):
        raise ValueError(INSTALL)
    if config.trace is not None:
        raise ValueError("trace: with engine 'ray' there is no device in this process whose timeline could be written")
    return ClusterBackend(config, RayConnection(config))

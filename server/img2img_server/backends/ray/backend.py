"""The backend with replicas on a Ray cluster: `img2img serve --engine ray`."""

import logging
import os
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import Protocol

from img2img_server.backends.local import LocalBackend, local
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
"""Ray and the packages that Ray Serve needs. Looking up ray.serve would import ray, which takes seconds."""
INSTALL = f"the engine 'ray' needs Ray Serve, which is not installed: {install_hint('ray')}"


class ReplicasConnection(Protocol):
    """A front's connection to its replicas, which are deployed if they do not exist yet."""

    async def open(self) -> Replicas:
        """Connects and waits until a replica is ready. Raises OSError on failure."""
        ...

    async def close(self) -> None:
        """Disconnects, and ends replicas that no other front can use. Does nothing if it was never opened."""
        ...


class ClusterBackend:
    """A front of an application's replicas. The methods are those of Backend."""

    def __init__(self, config: ServerConfig, connection: ReplicasConnection) -> None:
        self._config = config
        self._connection = connection
        self._roster: Roster | None = None
        self._front: Front | None = None
        self._models: RemoteModels | None = None

    @property
    def models(self) -> ModelRegistry:
        """The models of all replicas."""
        assert self._roster is not None, "open was called"
        return self._roster.models

    @property
    def runner(self) -> Front:
        """Sends requests to replicas."""
        assert self._front is not None, "open was called"
        return self._front

    @property
    def residency(self) -> RemoteModels:
        """Loads and unloads models on the replicas."""
        assert self._models is not None, "open was called"
        return self._models

    @property
    def cache(self) -> Cache | None:
        """None: each replica has its own."""
        return None

    async def open(self, health: Health, observe: Callable[[Span], None]) -> None:
        """Connects and polls the replicas for the first time. `observe` is never called, since no stage runs here."""
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
        """Starts to poll the replicas. `stuck` is never called: Ray replaces stuck replicas."""
        assert self._roster is not None, "open was called"
        await self._roster.poll()
        self._roster.start(self.runner.check_replicas)

    async def drain(self, grace: float) -> None:
        """Waits for this front's requests; those of other fronts continue."""
        if self._roster is not None:
            await self._roster.close()
        finished = await self.runner.drain(grace)
        _log.info("drained" if finished else "the grace period is over: ending the remaining requests")
        await self.runner.abandon(ShuttingDown("the server stopped before the request was finished"))

    async def abandon(self, error: ServerError) -> None:
        """Ends this front's requests at once."""
        await self.runner.abandon(error)

    async def close(self) -> None:
        """Disconnects from the replicas."""
        if self._roster is not None:
            await self._roster.close()
        await self._connection.close()

    def close_now(self) -> None:
        """Does nothing: there are no files."""


class RayConnection:
    """Deploys, or joins, the application of `config` on a Ray cluster. `make` creates each replica's backend."""

    def __init__(self, config: ServerConfig, make: Callable[[ServerConfig], LocalBackend] = local) -> None:
        # Read when ray is imported. Its failure handler would log a stack trace for each SIGTERM, which only starts a drain, and
        # auto-connect would start another cluster if anything used Ray after its shutdown.
        os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
        os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
        os.environ.update(MESSAGES)
        from img2img_server.backends.ray.deployment import Deployment

        self._deployment = Deployment(config, make)

    async def open(self) -> Replicas:
        """The replicas behind the deployment's handle."""
        from img2img_server.backends.ray.deployment import RayReplicas

        return RayReplicas(await self._deployment.open())

    async def close(self) -> None:
        """Leaves the cluster, and ends it if this front started it."""
        await self._deployment.close()


def cluster(config: ServerConfig) -> ClusterBackend:
    """A backend of Ray Serve replicas. Raises ValueError if Ray is not installed or a setting requires a local engine."""
    if any(find_spec(name) is None for name in _NEEDED):
        raise ValueError(INSTALL)
    if config.trace is not None:
        raise ValueError("trace: not supported with engine 'ray', since no device is used in this process")
    return ClusterBackend(config, RayConnection(config))

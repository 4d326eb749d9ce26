"""Replicas as a Ray Serve application: starts it, or joins it, and ends what it started.

The first front of an application deploys it, later ones join and use it as it is; a front that leaves takes nothing down. The
exception is a cluster that a front has started on its own machine, which ends with that front, and everything in it.
"""

import asyncio
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, LoggingConfig

from img2img_server.backends.base import LocalBackend
from img2img_server.backends.local import local
from img2img_server.backends.ray.load_balancing import stats_of
from img2img_server.backends.ray.replica import Replica
from img2img_server.backends.ray.resources import (
    ResourceShare,
    check_fit,
    common,
    differences,
    replica_config,
    share_of,
    variables,
)
from img2img_server.backends.ray.scaling import QUEUED_SECONDS, QueuedSecondsPolicy
from img2img_server.config import RaySettings, ServerConfig
from img2img_server.telemetry import logs

_log = logging.getLogger(__name__)

_TOLD_EVERY = 1.0
"""Seconds between two tellings of a replica's load, to the fronts and to the controller."""
_MOST_REQUESTS = 100_000
"""Requests that Ray lets a replica have at a time: no bound, as the engine has its own, and tells why it refuses."""
_HEALTH_EVERY = 2.0
_POLL = 0.1
_STARTS = 3
"""Times that a cluster is started: Ray gives up where its agents take more than 15 seconds, on a machine that is busy."""
_TRANSPORT: dict[str, Any] = {
    "_by_reference": False,
    "request_serialization": "pickle",
    "response_serialization": "pickle",
}
"""How a handle sends: by gRPC, which takes less time than Ray's own calls, and where a replica that died shows at once. All that
is sent is of importable classes, so it needs none of cloudpickle's care."""
_OBJECT_STORE = 80 * 2**20
"""Bytes of shared memory for Ray's objects, near the least that it takes: requests do not go through it."""


class ClusterUnavailable(OSError):
    """The cluster cannot be reached, or the application cannot run on it. The message is for the operator."""


class ServeReplica(Replica):
    """A replica as Ray Serve wants it: it is ready once it is made, and tells of itself. Runs in a process of its own."""

    async def __init__(  # type: ignore[misc]
        self, config: ServerConfig, make: Callable[[ServerConfig], LocalBackend], settings: Mapping[str, str]
    ) -> None:
        logs.configure(config.telemetry.log_format, config.telemetry.log_level)
        Replica.__init__(self, config, make)
        self._settings = dict(settings)
        await self.open()

    async def __del__(self) -> None:
        """Ray Serve awaits this before it ends the process, once no call is left or the time for that is over."""
        await self.close()

    async def settings(self) -> dict[str, str]:
        """What the application was deployed with."""
        return self._settings

    def record_routing_stats(self) -> dict[str, Any]:
        """What routers choose by, told to all fronts. Named by Ray Serve."""
        load = self.load_now()
        return stats_of(load.seconds, load.waiting + load.active, (*load.resident, *self.loading()))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the number of replicas is chosen by. Named by Ray Serve."""
        seconds = self.load_now().seconds
        # One that is stuck is replaced; another beside it would not help.
        return {QUEUED_SECONDS: seconds if seconds is not None and math.isfinite(seconds) else 0.0}


class Deployment:
    """The application that `config` names, for one front. `make` gives each replica its engine; it is pickled by reference.
    `environment` is set in the replicas' processes beside what they need."""

    def __init__(
        self,
        config: ServerConfig,
        make: Callable[[ServerConfig], LocalBackend] = local,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._config = config
        self._make = make
        self._environment = dict(environment or {})
        self._handle: DeploymentHandle[Any] | None = None
        self._connected = False
        self._owner = False

    async def open(self) -> "DeploymentHandle[Any]":
        """Connects, and returns once a replica is ready. Raises ClusterUnavailable where that cannot be, ValueError for
        settings that cannot work on this cluster."""
        return await asyncio.to_thread(self._open)

    async def close(self) -> None:
        """Leaves the cluster, and ends it where it was started here. Harmless where it was never opened."""
        await asyncio.to_thread(self._close)

    def _open(self) -> "DeploymentHandle[Any]":
        self._connect()
        try:
            serve.start(proxy_location="Disabled", logging_config=_QUIET)
            if self._status() in (None, ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.DELETING):
                self._deploy()
                joined = False
            else:
                joined = self._join()
            handle = self._handle = serve.get_app_handle(self._config.ray.app).options(**_TRANSPORT)
            if joined:
                self._compare(handle)
            return handle
        except (RuntimeError, ray.exceptions.RayError) as error:
            raise ClusterUnavailable(f"application '{self._config.ray.app}' does not run: {_reason(error)}") from error

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        _hush()
        address = self._config.ray.address
        try:
            if address is None:
                start_here()
            else:
                ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except Exception as error:  # Ray raises bare ones
            raise ClusterUnavailable(f"the Ray cluster {address or 'of this machine'} cannot be had: {_reason(error)}") from error
        self._connected, self._owner = True, address is None
        gcs = ray.get_runtime_context().gcs_address
        _log.info("Ray cluster at %s; other servers join it with RAY_AUTH_MODE=token, its token and --ray-address %s", gcs, gcs)

    def _deploy(self) -> None:
        settings, resources = self._config.ray, ray.cluster_resources()  # type: ignore[no-untyped-call]
        share = share_of(settings, resources, len(os.sched_getaffinity(0)))
        if self._owner:
            check_fit(settings, share, resources)
        _log.info("deploying application '%s': replicas of %g cores and %g GPUs", settings.app, share.cpus, share.gpus)
        options = serve_options(settings, share, self._environment, self._config.residency.load_on_request)
        deployment = serve.deployment(name="engine", **options)(ServeReplica)
        bound = deployment.bind(replica_config(self._config, share), self._make, common(self._config))
        try:
            serve.run(bound, name=settings.app, route_prefix=None)
        except RuntimeError:
            serve.delete(settings.app)
            raise

    def _join(self) -> bool:
        """Waits until the application of another front runs, be it with fewer replicas than it should have (UNHEALTHY)."""
        app = self._config.ray.app
        while (status := self._status()) not in (ApplicationStatus.RUNNING, ApplicationStatus.UNHEALTHY):
            if status in (None, ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.DELETING):
                raise ClusterUnavailable(f"application '{app}' does not run: another server could not deploy it")
            time.sleep(_POLL)
        return True

    def _compare(self, handle: "DeploymentHandle[Any]") -> None:
        """Says where this server's settings are not the application's, whose settings hold."""
        app = self._config.ray.app
        _log.info("joined application '%s'", app)
        for line in differences(common(self._config), handle.settings.remote().result()):
            _log.warning("application '%s' was deployed with other settings, which hold: %s", app, line)

    def _status(self) -> ApplicationStatus | None:
        found = serve.status().applications.get(self._config.ray.app)
        return None if found is None else found.status

    def _close(self) -> None:
        if self._handle is not None:
            # It tells the controller how it does every few seconds, and would go on.
            self._handle.shutdown()  # type: ignore[no-untyped-call]
            self._handle = None
        if not self._connected:
            return
        self._connected = False
        if self._owner:
            # So that replicas end in good order. All else of Ray's needs none.
            serve.delete(self._config.ray.app)
        ray.shutdown()


_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


def start_here() -> None:
    """Starts a cluster on this machine, and connects to it. It listens on the machine's address (Ray refuses loopback), and Ray
    lets in who has the token, ~/.ray/auth_token, which it makes where there is none."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for tries in range(_STARTS - 1, -1, -1):
        try:
            _start()
        except Exception:  # Ray raises bare ones
            ray.shutdown()
            if not tries:
                raise
            _log.warning("the Ray cluster did not start in time, trying again")
        else:
            return


def _start() -> None:
    ray.init(
        address="local",
        num_cpus=len(os.sched_getaffinity(0)),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        object_store_memory=_OBJECT_STORE,
    )


def serve_options(
    settings: RaySettings, share: ResourceShare, environment: Mapping[str, str], load_on_request: bool = True
) -> dict[str, Any]:
    """The options of the deployment, in Ray Serve's terms."""
    # A replica that may not load a model refuses its requests: where another has it, they go nowhere else.
    spread_after = settings.spread_after if load_on_request else math.inf
    options: dict[str, Any] = {
        "max_ongoing_requests": _MOST_REQUESTS,
        "health_check_period_s": _HEALTH_EVERY,
        "graceful_shutdown_timeout_s": settings.graceful_shutdown_timeout,
        "graceful_shutdown_wait_loop_s": 0.2,
        "logging_config": _QUIET,
        "max_constructor_retry_count": 1,
        "ray_actor_options": {
            "num_cpus": share.cpus,
            "num_gpus": share.gpus,
            "runtime_env": {"env_vars": {**variables(share), **environment}},
        },
        "request_router_config": {
            "request_router_class": "img2img_server.backends.ray.router.LeastWorkRouter",
            "request_router_kwargs": {"spread_after": spread_after},
            "request_routing_stats_period_s": _TOLD_EVERY,
        },
    }
    if settings.most_replicas == settings.min_replicas:
        return {**options, "num_replicas": settings.min_replicas}
    return {**options, "autoscaling_config": _autoscaling(settings)}


def _autoscaling(settings: RaySettings) -> AutoscalingConfig:
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]
        policy_function=QueuedSecondsPolicy, policy_kwargs={"target": settings.target_queued_seconds}
    )
    with warnings.catch_warnings():
        # What is to come in place of metrics_interval_s has, in Ray 2.60, no effect.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.most_replicas,
            upscale_delay_s=settings.upscale_delay,
            downscale_delay_s=settings.downscale_delay,
            metrics_interval_s=_TOLD_EVERY,
            look_back_period_s=5 * _TOLD_EVERY,
            policy=policy,
        )


def _hush() -> None:
    """Has Ray's own notes in this process go where all of the log goes, and only what is worth a warning."""
    for name in ("ray", "ray.serve"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    # That it leaves SIGTERM alone, which is as it should be.
    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)


def _reason(error: BaseException) -> str:
    """What went wrong, in a line: the last of a report of Ray's, which is a traceback of another process."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

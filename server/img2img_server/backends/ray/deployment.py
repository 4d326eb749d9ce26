"""Replicas as a Ray Serve application: deploys or joins it, and calls replicas through Ray Serve's handles.

The first front of an application deploys it; later fronts join and use it with its settings. A front that leaves does not stop
the application, except if it has started the cluster on its own machine, which ends with it. Calls use handles instead of Serve's
proxies, which lose deadlines, cancellation and errors.
"""

import asyncio
import logging
import math
import os
import time
import warnings
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import grpc
import ray
from ray import serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RaySystemError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, LoggingConfig

from img2img_server.backends.local import LocalBackend, local
from img2img_server.backends.ray.load_balancing import QUEUED_SECONDS, QueuedSecondsPolicy, stats_of
from img2img_server.backends.ray.messages import (
    Card,
    Everywhere,
    ModelQuery,
    NoResponse,
    RemoteRequest,
    ReplicaLeft,
    ReplicaLost,
)
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
from img2img_server.config import RaySettings, ServerConfig
from img2img_server.engine.request import Completed, Ending, Event, Failed
from img2img_server.telemetry import logs

_log = logging.getLogger(__name__)

_REPORT_INTERVAL = 1.0
"""Seconds between two reports of a replica's load to the fronts and the controller."""
_MOST_REQUESTS = 100_000
"""Ray's maximum of requests per replica: practically no limit, because the engine has its own, with better errors."""
_HEALTH_EVERY = 2.0
_POLL = 0.1
_STARTS = 10
"""Attempts to start a cluster: Ray gives up if its processes are not ready after 30 seconds, as on a busy machine."""
_TRANSPORT: dict[str, Any] = {
    "_by_reference": False,
    "request_serialization": "pickle",
    "response_serialization": "pickle",
}
"""How a handle sends: by gRPC, which is faster than Ray's own calls and detects dead replicas at once. Messages consist of
importable classes, so plain pickle suffices."""
_OBJECT_STORE = 80 * 2**20
"""Bytes of shared memory for Ray's objects, near Ray's minimum, because requests do not use it."""


class ClusterUnavailable(OSError):
    """The cluster is unreachable, or the application cannot run on it. The message is for the operator."""


class ServeReplica(Replica):
    """A replica as a Ray Serve deployment, in its own process: ready when it is constructed, and reports its load."""

    async def __init__(  # type: ignore[misc]
        self, config: ServerConfig, make: Callable[[ServerConfig], LocalBackend], settings: Mapping[str, str]
    ) -> None:
        logs.configure(config.telemetry.log_format, config.telemetry.log_level)
        Replica.__init__(self, config, make)
        self._settings = dict(settings)
        await self.open()

    async def __del__(self) -> None:
        """Awaited by Ray Serve before it ends the process, after calls have ended or their time is over."""
        await self.close()

    async def settings(self) -> dict[str, str]:
        """The settings that the application was deployed with."""
        return self._settings

    def record_routing_stats(self) -> dict[str, Any]:
        """The load for routers, reported to all fronts. Called by Ray Serve."""
        load = self.load_now()
        return stats_of(load.seconds, load.waiting + load.active, (*load.resident, *self.loading()))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The load for autoscaling. Called by Ray Serve."""
        seconds = self.load_now().seconds
        # A stuck replica is replaced, so it does not justify another one.
        return {QUEUED_SECONDS: seconds if seconds is not None and math.isfinite(seconds) else 0.0}


class Deployment:
    """The application of `config`, for one front. `make` creates each replica's backend; it is pickled by reference.
    `environment` is added to the environment of the replicas' processes."""

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
        """Connects and waits until a replica is ready. Raises ClusterUnavailable on failure, and ValueError for settings that
        cannot work on this cluster."""
        return await asyncio.to_thread(self._open)

    async def close(self) -> None:
        """Leaves the cluster, and ends it if it was started here. Does nothing if it was never opened."""
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
        except Exception as error:  # Ray raises bare exceptions
            raise ClusterUnavailable(f"cannot use the Ray cluster {address or 'of this machine'}: {_reason(error)}") from error
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
        """Waits until the application of another front runs, even with fewer replicas than configured (UNHEALTHY)."""
        app = self._config.ray.app
        while (status := self._status()) not in (ApplicationStatus.RUNNING, ApplicationStatus.UNHEALTHY):
            if status in (None, ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.DELETING):
                raise ClusterUnavailable(f"application '{app}' does not run: another server could not deploy it")
            time.sleep(_POLL)
        return True

    def _compare(self, handle: "DeploymentHandle[Any]") -> None:
        """Logs differences between this server's settings and the application's, which apply."""
        app = self._config.ray.app
        _log.info("joined application '%s'", app)
        for line in differences(common(self._config), handle.settings.remote().result()):
            _log.warning("application '%s' was deployed with other settings, which apply: %s", app, line)

    def _status(self) -> ApplicationStatus | None:
        found = serve.status().applications.get(self._config.ray.app)
        return None if found is None else found.status

    def _close(self) -> None:
        if self._handle is not None:
            # Otherwise the handle would continue to report to the controller.
            self._handle.shutdown()  # type: ignore[no-untyped-call]
            self._handle = None
        if not self._connected:
            return
        self._connected = False
        if self._owner:
            # Shuts replicas down gracefully; the rest of Ray does not need that.
            serve.delete(self._config.ray.app)
        ray.shutdown()


_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


def start_here() -> None:
    """Starts a cluster on this machine and connects to it. It listens on the machine's address, because Ray refuses loopback, and
    requires the token in ~/.ray/auth_token, which Ray creates if it does not exist."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for tries in range(_STARTS - 1, -1, -1):
        try:
            _start()
        except Exception:  # Ray raises bare exceptions
            ray.shutdown()
            if not tries:
                raise
            _log.warning("the Ray cluster did not start in time: retrying")
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
    """Ray Serve's options of the deployment."""
    # If replicas may not load models on request, requests must go to a replica that has the model.
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
            "request_routing_stats_period_s": _REPORT_INTERVAL,
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
        # The replacement of metrics_interval_s has no effect in Ray 2.60.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.most_replicas,
            upscale_delay_s=settings.upscale_delay,
            downscale_delay_s=settings.downscale_delay,
            metrics_interval_s=_REPORT_INTERVAL,
            look_back_period_s=5 * _REPORT_INTERVAL,
            policy=policy,
        )


def _hush() -> None:
    """Routes Ray's own log messages in this process, from warnings on, to the server's log."""
    for name in ("ray", "ray.serve"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    # It warns that it does not handle SIGTERM, which is intended.
    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)


def _reason(error: BaseException) -> str:
    """The cause in one line: the last line of Ray's report, which is a traceback of another process."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


_LOST = (
    RayActorError,  # dead or unreachable
    NodeDiedError,
    WorkerCrashedError,
    ObjectLostError,  # the response was on a node that died
    RaySystemError,
    TaskCancelledError,  # by Ray, because the replica stops; nothing awaits calls that we cancel
)
_NO_REPLICA = (DeploymentUnavailableError, ReplicaUnavailableError)
"""Ray's errors if there is no replica."""
_UNREACHABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""Statuses of Ray's own gRPC if a replica's process has ended or is ending."""
_POLL_TIMEOUT = 5.0
"""Seconds that a replica has to respond to a poll."""


class RayReplicas:
    """The replicas behind a handle of the deployment."""

    def __init__(self, handle: "DeploymentHandle[Any]") -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    async def transform(self, job: RemoteRequest) -> Ending:
        """Runs a request on one replica."""
        ending: Ending = await self._one("transform", job)
        return ending

    async def stream(self, job: RemoteRequest) -> AsyncGenerator[Event, None]:
        """Runs a request on one replica and yields its events."""
        response: Any = self._streaming.stream.remote(job)
        over = False
        try:
            with _lost():
                async for event in response:
                    over = isinstance(event, Completed | Failed)  # callers do not read beyond the ending
                    yield event
        finally:
            if not over:
                response.cancel()

    async def ask(self, method: Literal["bring", "load"], asked: ModelQuery) -> Card | Failed:
        """Calls a model method of one replica."""
        response: Card | Failed = await self._one(method, asked)
        return response

    async def everywhere(self, method: Everywhere, *arguments: Any) -> Sequence[Any]:
        """The responses of all replicas. Lost ones are omitted; a poll ("look") has a NoResponse for each that is too slow."""
        seconds = _POLL_TIMEOUT if method == "look" else None
        # Not results_async, which has one timeout for all: a replica that hangs would hide the others' responses.
        sending = self._handle.broadcast(method, *arguments)._fetch_replica_results_async()
        try:
            with _lost():
                sent = await asyncio.wait_for(sending, seconds)
        except TimeoutError:
            return [NoResponse()]
        responses = await asyncio.gather(*(_response(result, seconds) for result in sent))
        return [response for response in responses if response is not None]

    async def _one(self, method: str, argument: object) -> Any:
        response = getattr(self._handle, method).remote(argument)
        try:
            with _lost():
                return await response
        except asyncio.CancelledError:
            response.cancel()
            raise


async def _response(result: Any, seconds: float | None) -> Any:
    """A replica's response, None if it is lost, NoResponse if it takes longer than `seconds`."""
    try:
        with _lost():
            return await asyncio.wait_for(result.get_async(), seconds)
    except ReplicaLost:
        return None
    except TimeoutError:
        return NoResponse()


@contextmanager
def _lost() -> Iterator[None]:
    """Converts Ray's errors in the block to ReplicaLost or ReplicaLeft."""
    try:
        yield
    except _NO_REPLICA as error:
        raise ReplicaLeft(f"{type(error).__name__}: {error}") from error
    except (*_LOST, grpc.aio.AioRpcError) as error:
        if isinstance(error, grpc.aio.AioRpcError) and error.code() not in _UNREACHABLE:
            raise
        raise ReplicaLost(f"{type(error).__name__}: {error}") from error

"""A replica's share of the machine, and the settings that all replicas of an application have in common."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from img2img_server.config import RaySettings, ServerConfig, TelemetrySettings
from img2img_server.settings.setting import settings_of, value_of

_COMMON = (
    "models",
    "default_model",
    "watchdog",
    "warm_up",
    "cache_bytes",
    "allow_unverified",
    "limits",
    "execution",
    "residency",
    "ray",
)
"""Settings and sections that apply to replicas. All others apply to each front."""
_OF_FRONTS = ("ray_address", "ray_app")


@dataclass(frozen=True, slots=True)
class ResourceShare:
    """Cores and GPUs of one replica, as counted by Ray: reserved but not enforced."""

    cpus: float
    gpus: float

    @property
    def threads(self) -> int | None:
        """CPU threads of one model call; None for the machine's default if no cores are reserved."""
        return max(1, int(self.cpus)) if self.cpus else None


def share_of(settings: RaySettings, resources: Mapping[str, float], cores: int) -> ResourceShare:
    """A replica's share of a cluster with these resources, whose machines have `cores` cores."""
    gpus = settings.num_gpus
    if gpus is None:
        gpus = 1.0 if resources.get("GPU", 0.0) >= 1 else 0.0
    cpus = settings.num_cpus
    if cpus is None:
        cpus = 1.0 if gpus else float(max(1, cores // settings.most_replicas))
    return ResourceShare(cpus, gpus)


def check_fit(settings: RaySettings, share: ResourceShare, resources: Mapping[str, float]) -> None:
    """Raises ValueError if `min_replicas` do not fit into a cluster that cannot grow: Ray would wait forever."""
    for what, name, each in (("cores", "CPU", share.cpus), ("GPUs", "GPU", share.gpus)):
        there = resources.get(name, 0.0)
        if settings.min_replicas * each > there:
            raise ValueError(
                f"ray_min_replicas: {settings.min_replicas} replicas of {each:g} {what} each do not fit into {there:g} {what}; "
                f"set ray_num_{name.lower()}s"
            )


def replica_config(config: ServerConfig, share: ResourceShare) -> ServerConfig:
    """A replica's settings: model calls use its cores, and paths are absolute. Settings of the front, such as the paths of tokens
    and keys, are not included."""
    threads = config.execution.threads or share.threads
    cache = config.execution.cache
    execution = replace(config.execution, threads=threads, cache=cache.absolute() if cache is not None else None)
    shared = {
        **{name: getattr(config, name) for name in _COMMON},
        "models": config.models.absolute(),
        "execution": execution,
        "telemetry": TelemetrySettings(log_format=config.telemetry.log_format),
        "grace": config.ray.graceful_shutdown_timeout,
    }
    return ServerConfig(**shared)


MESSAGES = {"RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1)}
"""Read by Ray Serve on both sides. Its default of 4 MiB is too small for several large images as raw pixels."""


def variables(share: ResourceShare) -> dict[str, str]:
    """The environment of a replica's process, read by libraries when they are imported."""
    own = {
        **MESSAGES,
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # the replica never blocks the event loop
        "OMP_WAIT_POLICY": "PASSIVE",
        "DIFFUSERS_VERBOSITY": "error",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "GRPC_VERBOSITY": "ERROR",
        "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "0",  # logs crashes of libraries; disabled in fronts
    }
    if share.threads is not None:
        own["OMP_NUM_THREADS"] = str(share.threads)
    return own


def common(config: ServerConfig) -> dict[str, str]:
    """The common settings of replicas, by name, as text."""
    mine = replace(config, models=config.models.absolute())
    return {
        one.name: str(value_of(mine, one))
        for one in settings_of(ServerConfig)
        if one.path[0] in _COMMON and one.name not in _OF_FRONTS
    }


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Lines that describe how `ours` differ from the application's settings."""
    return [
        f"{name} is {theirs.get(name, 'not set')} there, not {value}" for name, value in ours.items() if theirs.get(name) != value
    ]

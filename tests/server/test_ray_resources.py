"""The share of a machine that a replica gets, and the settings that servers of one application must have in common."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from img2img_server.backends.ray.deployment import ClusterUnavailable, Deployment, serve_options
from img2img_server.backends.ray.resources import (
    ResourceShare,
    check_fit,
    common,
    differences,
    replica_config,
    share_of,
    variables,
)
from img2img_server.config import AssetSettings, ModelSettings, RaySettings, ServerConfig, TelemetrySettings, TlsSettings
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.runtime.execution import Execution
from ray.serve.schema import ApplicationStatus

CPUS, GPUS = {"CPU": 16.0}, {"CPU": 16.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("settings", "resources", "share"),
    [
        (RaySettings(), CPUS, ResourceShare(16, 0)),
        (RaySettings(min_replicas=2), CPUS, ResourceShare(8, 0)),
        (RaySettings(max_replicas=3), CPUS, ResourceShare(5, 0)),
        (RaySettings(min_replicas=40), CPUS, ResourceShare(1, 0)),
        (RaySettings(num_cpus=0.5), CPUS, ResourceShare(0.5, 0)),
        (RaySettings(min_replicas=2), GPUS, ResourceShare(1, 1)),
        (RaySettings(min_replicas=2, num_cpus=4), GPUS, ResourceShare(4, 1)),
        (RaySettings(min_replicas=2, num_gpus=0.5), GPUS, ResourceShare(1, 0.5)),
        (RaySettings(min_replicas=2, num_gpus=0), GPUS, ResourceShare(8, 0)),
    ],
)
def test_replica_gets_a_gpu_if_available_else_a_share_of_the_cpus(
    settings: RaySettings, resources: dict[str, float], share: ResourceShare
) -> None:
    assert share_of(settings, resources, 16) == share


@pytest.mark.parametrize(
    ("share", "resources", "problem"),
    [
        (ResourceShare(9, 0), CPUS, "2 replicas of 9 cores each do not fit into 16 cores; set ray_num_cpus"),
        (ResourceShare(1, 1), {"CPU": 16.0, "GPU": 1.0}, "2 replicas of 1 GPUs each do not fit into 1 GPUs; set ray_num_gpus"),
        (ResourceShare(1, 1), CPUS, "do not fit into 0 GPUs"),
    ],
)
def test_replicas_that_exceed_the_cluster_are_refused_at_once(
    share: ResourceShare, resources: dict[str, float], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        check_fit(RaySettings(min_replicas=2), share, resources)
    check_fit(RaySettings(min_replicas=2), ResourceShare(8, 0), CPUS)


@pytest.mark.parametrize(("cpus", "threads"), [(4, 4), (1.5, 1), (0.5, 1), (0, None)])
def test_thread_count_is_the_replicas_cpu_count(cpus: float, threads: int | None) -> None:
    share = ResourceShare(cpus, 0)
    config = replica_config(ServerConfig(Path("models"), engine="ray"), share)
    assert config.execution.threads == threads
    assert variables(share).get("OMP_NUM_THREADS") == (None if threads is None else str(threads))


def test_replica_settings_are_kept_and_paths_are_absolute() -> None:
    asked = ServerConfig(Path("models"), engine="ray", execution=Execution(threads=3, cache=Path("engines")))
    config = replica_config(asked, ResourceShare(8, 0))
    assert config.execution.threads == 3
    assert config.models == Path("models").absolute()
    assert config.execution.cache == Path("engines").absolute()


def test_front_only_settings_are_not_sent_to_replicas() -> None:
    asked = ServerConfig(
        Path("models"),
        engine="ray",
        host="0.0.0.0",
        tokens=Path("/private/tokens"),
        tls=TlsSettings(Path("/private/certificate"), Path("/private/key")),
        assets=AssetSettings(url="s3://user:secret@bucket"),
        telemetry=TelemetrySettings(otlp_endpoint="http://user:secret@collector", log_format="json"),
        residency=ModelSettings(preload=("a",)),
    )
    sent = replica_config(asked, ResourceShare(1, 0))
    assert not any(word in pickle.dumps(sent) for word in (b"private", b"secret"))
    assert (sent.residency, sent.telemetry.log_format) == (asked.residency, "json")


def test_fronts_must_match_only_replica_settings_of_the_application() -> None:
    ours = ServerConfig(Path("models"), engine="ray")
    fronts = replace(ours, port=0, grace=1.0, tls=TlsSettings(Path("c"), Path("k")), ray=replace(ours.ray, address="auto"))
    assert differences(common(fronts), common(ours)) == []
    other = replace(ours, models=Path("/elsewhere"), limits=QueueLimits(max_batch_size=3), ray=replace(ours.ray, max_replicas=7))
    assert [line.split()[0] for line in differences(common(other), common(ours))] == [
        "models",
        "max_batch_size",
        "ray_max_replicas",
    ]
    assert "max_batch_size is 16 there, not 3" in differences(common(other), common(ours))


@pytest.mark.parametrize("runs", [ApplicationStatus.RUNNING, ApplicationStatus.UNHEALTHY])
def test_running_application_is_joined_even_with_missing_replicas(
    runs: ApplicationStatus, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment, told = Deployment(ServerConfig(Path("models"), engine="ray")), iter([ApplicationStatus.DEPLOYING, runs])
    monkeypatch.setattr(deployment, "_status", lambda: next(told))
    assert deployment._join()
    assert next(told, None) is None


def test_failed_deployment_is_reported_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = Deployment(ServerConfig(Path("models"), engine="ray"))
    monkeypatch.setattr(deployment, "_status", lambda: ApplicationStatus.DEPLOY_FAILED)
    with pytest.raises(ClusterUnavailable, match="could not deploy it"):
        deployment._join()


def _options(settings: RaySettings, share: ResourceShare) -> dict[str, Any]:
    return serve_options(settings, share, {"MORE": "1"})


def test_replica_options_have_its_share_and_no_tight_request_limit() -> None:
    options = _options(RaySettings(min_replicas=2), ResourceShare(1, 0.5))
    actor = options["ray_actor_options"]
    assert (actor["num_cpus"], actor["num_gpus"]) == (1, 0.5)
    assert actor["runtime_env"]["env_vars"]["MORE"] == "1"
    assert actor["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "1"
    assert options["max_ongoing_requests"] > QueueLimits().max_waiting


def test_autoscaling_is_used_only_if_min_and_max_differ() -> None:
    fixed = _options(RaySettings(min_replicas=3), ResourceShare(1, 0))
    assert fixed["num_replicas"] == 3
    assert "autoscaling_config" not in fixed
    settings = RaySettings(min_replicas=1, max_replicas=4, upscale_delay=7, downscale_delay=8, target_queued_seconds=9)
    scaled = _options(settings, ResourceShare(1, 0))
    assert "num_replicas" not in scaled
    found = scaled["autoscaling_config"]
    assert (found.min_replicas, found.max_replicas, found.upscale_delay_s, found.downscale_delay_s) == (1, 4, 7, 8)
    assert found.policy.policy_kwargs == {"target": 9}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"min_replicas": 3, "max_replicas": 2}, r"ray_max_replicas \(2\) is less than ray_min_replicas \(3\)"),
        ({"address": "ray://head:10001"}, "ray_address: ray:// addresses"),
        ({"app": ""}, "ray_app is empty"),
    ],
)
def test_invalid_ray_settings_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        RaySettings(**settings)

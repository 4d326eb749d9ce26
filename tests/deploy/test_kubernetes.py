"""The manifests are what Kubernetes takes, and agree with the server, with the image and with each other."""

import argparse
import errno
import os
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from img2img_client import health_command
from img2img_server.assets.store import AssetStore
from img2img_server.config import AssetSettings, ServerConfig
from img2img_server.settings.sources import SettingError
from img2img_server.telemetry.metrics import WORK
from kustomizing import KUBERNETES, Document, build, read
from serving_settings import CLOSING, config_of

_VERSIONS = ("1.30", "1.37")
"""The oldest supported Kubernetes, and the newest with schemas."""
_COMPONENTS = ("tls", "autoscaling")


@dataclass(frozen=True)
class Built:
    """An overlay as it would be applied, with components or without."""

    name: str
    documents: tuple[Document, ...]

    def of(self, kind: str) -> list[Document]:
        return [document for document in self.documents if document["kind"] == kind]

    @cached_property
    def deployment(self) -> Any:
        (deployment,) = self.of("Deployment")
        return deployment["spec"]

    @cached_property
    def pod(self) -> Any:
        return self.deployment["template"]["spec"]

    @cached_property
    def container(self) -> Any:
        (container,) = self.pod["containers"]
        return container

    @cached_property
    def variables(self) -> dict[str, str]:
        return {one["name"]: one["value"] for one in self.container["env"]}

    @cached_property
    def mounts(self) -> dict[str, Any]:
        """The mounts and their volumes, by mount path."""
        volumes = {volume["name"]: volume for volume in self.pod["volumes"]}
        return {mount["mountPath"]: {**mount, "volume": volumes[mount["name"]]} for mount in self.container["volumeMounts"]}

    @cached_property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    def config(self, folder: Path) -> ServerConfig:
        """The configuration of the server in the pod."""
        (config,) = self.of("ConfigMap")
        (folder / "server.toml").write_text(config["data"]["server.toml"], encoding="utf-8")
        assert self.container["args"][0] == "serve"
        return config_of(self.container["args"][1:], self.variables, folder / "server.toml")


@pytest.fixture(params=[(name, parts) for name in ("cpu", "cuda") for parts in ((), _COMPONENTS)], ids=str)
def built(request: pytest.FixtureRequest) -> Built:
    name, parts = request.param
    return Built(name, tuple(build(KUBERNETES / "overlays" / name, parts)))


@pytest.fixture
def config(built: Built, tmp_path: Path) -> ServerConfig:
    return built.config(tmp_path)


def test_manifests_are_valid_for_supported_kubernetes_versions(built: Built) -> None:
    import kubernetes_validate  # type: ignore[import-untyped]  # 2 s, for which every process of the tests would wait

    for version in _VERSIONS:
        for document in (*built.documents, *read(KUBERNETES / "load-models.yaml")):
            if document["kind"] != "PodMonitor":  # The Prometheus operator's: held against its schema by hand.
                kubernetes_validate.validate(document, version, strict=True)


def test_schema_validation_detects_an_unknown_key() -> None:
    import kubernetes_validate

    wrong = build(KUBERNETES / "overlays" / "cpu")
    (deployment,) = (one for one in wrong if one["kind"] == "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["readinessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinessProb"):
        kubernetes_validate.validate(deployment, _VERSIONS[-1], strict=True)


def test_every_kubernetes_file_is_used() -> None:
    used = {KUBERNETES / "load-models.yaml", KUBERNETES / "components" / "autoscaling" / "prometheus-adapter.yaml"}
    for kustomization in KUBERNETES.rglob("kustomization.yaml"):
        (content,) = read(kustomization)
        used.add(kustomization)
        used |= {kustomization.parent / name for name in content.get("resources", ())}
        used |= {kustomization.parent / patch["path"] for patch in content.get("patches", ())}
        used |= {kustomization.parent / name for one in content.get("configMapGenerator", ()) for name in one["files"]}
    assert {path for path in KUBERNETES.rglob("*") if path.is_file()} <= used


def test_server_reads_its_config_file_and_relative_paths(built: Built, config: ServerConfig) -> None:
    where = Path(built.variables["IMG2IMG_CONFIG"])
    assert where.name == "server.toml"
    assert built.mounts[str(where.parent)]["volume"]["configMap"]["name"] == "img2img-config"
    assert config.tokens is not None, "nobody is let in by default"
    assert built.mounts[str(config.tokens.parent)]["volume"]["secret"]["secretName"] == "img2img-tokens"
    claims = {claim["metadata"]["name"] for claim in built.of("PersistentVolumeClaim")}
    models, assets = built.mounts[str(config.models)], built.mounts[str(Path(str(config.assets.url)).parent)]
    assert {
        models["volume"]["persistentVolumeClaim"]["claimName"],
        assets["volume"]["persistentVolumeClaim"]["claimName"],
    } == claims
    assert models["readOnly"]
    assert "readOnly" not in assets
    assert {"/tmp", "/cache"} <= built.mounts.keys(), "what else is written"


async def test_asset_volume_owned_by_root_is_accepted(
    config: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fsGroup the server can write to a volume that it does not own, but cannot change its mode."""
    chmod, volume = Path.chmod, tmp_path / "assets"
    volume.mkdir()

    def refused_for_the_volume(path: Path, mode: int) -> None:
        if path == volume:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        chmod(path, mode)

    monkeypatch.setattr(Path, "chmod", refused_for_the_volume)
    kept = AssetStore(AssetSettings(url=str(tmp_path / str(config.assets.url).lstrip("/"))))
    await kept.open()
    await kept.close()


def test_plaintext_listening_beyond_loopback_must_be_explicit(built: Built, config: ServerConfig) -> None:
    assert config.host == "0.0.0.0"
    if config.tls.certificate is None:
        assert config.allow_insecure
        return
    assert not config.allow_insecure
    for file, name in (
        (config.tls.certificate, "tls.crt"),
        (config.tls.key, "tls.key"),
        (built.variables["IMG2IMG_CA"], "ca.crt"),
    ):
        assert Path(str(file)).name == name, "as cert-manager names them"
        assert built.mounts[str(Path(str(file)).parent)]["volume"]["secret"]["secretName"] == "img2img-tls"


def test_ports_match_the_server_config(built: Built, config: ServerConfig) -> None:
    assert built.ports == {"grpc": config.port, "metrics": config.telemetry.metrics_port}
    assert config.telemetry.metrics_host == "0.0.0.0"
    for service in built.of("Service"):
        assert [(port["port"], port["targetPort"]) for port in service["spec"]["ports"]] == [(config.port, "grpc")]
    assert [service["spec"].get("clusterIP") for service in built.of("Service")] == ["None", None]
    (policy,) = built.of("NetworkPolicy")
    assert [rule["ports"] for rule in policy["spec"]["ingress"]] == [[{"port": port}] for port in built.ports.values()]
    for monitor in built.of("PodMonitor"):
        assert [end["port"] for end in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]


def test_probes_check_the_servers_health(built: Built, config: ServerConfig) -> None:
    parser = argparse.ArgumentParser()
    health_command.configure(parser)
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = built.container[kind]
        if config.tls.certificate is None:
            assert probe["grpc"] == {"port": config.port}
            continue
        assert "grpc" not in probe, "Kubernetes' own probes speak no TLS"
        assert probe["exec"]["command"][:2] == ["img2img", "health"]
        assert parser.parse_args(probe["exec"]["command"][2:]).timeout < probe["timeoutSeconds"]
        assert built.variables["IMG2IMG_TARGET"] == f"https://localhost:{config.port}"


def test_probes_leave_time_to_load_and_to_drain(built: Built, config: ServerConfig) -> None:
    startup, liveness = built.container["startupProbe"], built.container["livenessProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 20 * 60
    # Health is NOT_SERVING from the first second of any drain.
    assert liveness["periodSeconds"] * (liveness["failureThreshold"] - 1) > config.grace + CLOSING
    assert built.pod["terminationGracePeriodSeconds"] > config.grace + CLOSING


def test_kubernetes_service_variables_do_not_become_settings(built: Built) -> None:
    """Kubernetes has variables for each service of the namespace, and of "img2img" they look like ours."""
    assert any(service["metadata"]["name"] == "img2img" and "clusterIP" not in service["spec"] for service in built.of("Service"))
    with pytest.raises(SettingError, match="IMG2IMG_PORT"):
        config_of(["--models", "m"], {"IMG2IMG_PORT": "tcp://10.0.0.1:50051"})
    assert built.pod["enableServiceLinks"] is False


def test_pods_run_with_restricted_permissions(built: Built) -> None:
    (namespace,) = built.of("Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    user = int(instruction("USER").partition(":")[0])
    security = built.pod["securityContext"]
    assert user > 0
    assert [security[key] for key in ("runAsUser", "runAsGroup", "fsGroup")] == [user] * 3
    assert security["runAsNonRoot"]
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert built.container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    (account,) = built.of("ServiceAccount")
    assert account["automountServiceAccountToken"] is built.pod["automountServiceAccountToken"] is False
    assert built.pod["serviceAccountName"] == account["metadata"]["name"]
    (policy,) = built.of("NetworkPolicy")
    assert (policy["spec"]["policyTypes"], policy["spec"]["egress"]) == (["Ingress", "Egress"], [])


def test_all_selectors_match_the_pod_labels(built: Built) -> None:
    labels = built.deployment["template"]["metadata"]["labels"]
    selectors = [built.deployment["selector"]["matchLabels"], *(one["spec"]["selector"] for one in built.of("Service"))]
    for kind in ("PodDisruptionBudget", "PodMonitor"):
        selectors += [one["spec"]["selector"]["matchLabels"] for one in built.of(kind)]
    selectors += [one["spec"]["podSelector"]["matchLabels"] for one in built.of("NetworkPolicy")]
    selectors += [one["labelSelector"]["matchLabels"] for one in built.pod["topologySpreadConstraints"]]
    assert all(selector == labels for selector in selectors)
    assert {document["metadata"].get("namespace") for document in built.documents if document["kind"] != "Namespace"} == {
        "img2img"
    }


def test_gpu_pod_requests_one_gpu_and_reports_failure(tmp_path: Path) -> None:
    cuda, cpu = (Built(name, tuple(build(KUBERNETES / "overlays" / name))) for name in ("cuda", "cpu"))
    assert cuda.container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert cuda.config(tmp_path).execution.provider == "cuda"
    assert "nvidia.com/gpu" not in cpu.container["resources"]["limits"]
    assert cpu.container["resources"]["limits"] == cpu.container["resources"]["requests"], "its threads are the limit's"
    for one in (cuda, cpu):
        assert one.container["image"].endswith(f"{project_version()}-{one.name}")


def test_pod_count_scales_with_queued_work() -> None:
    scaled = Built("cpu", tuple(build(KUBERNETES / "overlays" / "cpu", _COMPONENTS)))
    (autoscaler,) = scaled.of("HorizontalPodAutoscaler")
    (deployment,) = scaled.of("Deployment")
    assert autoscaler["spec"]["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    assert "replicas" not in deployment["spec"], "else each apply would undo the autoscaler's work"
    (metric,) = autoscaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == WORK.name, "which a real server exports, as the dashboard's tests show"
    (adapter,) = read(KUBERNETES / "components" / "autoscaling" / "prometheus-adapter.yaml")
    (rule,) = adapter["rules"]["custom"]
    assert rule["seriesQuery"].partition("{")[0] == WORK.name


def instruction(name: str) -> str:
    """The value of the Containerfile's only such instruction."""
    lines = (REPOSITORY / "deploy" / "Containerfile").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name} "))
    return line.removeprefix(f"{name} ")


def project_version() -> str:
    return str(tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])

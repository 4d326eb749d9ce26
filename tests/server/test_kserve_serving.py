"""KServe on a complete server: enabling it, tokens, TLS, drain, and missing packages."""

import os
import queue
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from conftest import REPOSITORY
from granting import grant
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from img2img_server.config import TlsSettings
from kserve_calls import Gate, client_of, image_input, serving
from tritonclient.utils import InferenceServerException  # type: ignore[import-untyped]

NAME = "inference.GRPCInferenceService"


def status_of(call: Any) -> str:
    with pytest.raises(InferenceServerException) as caught:
        call()
    return str(caught.value.status()).removeprefix("StatusCode.")


def reflected(channel: grpc.Channel, **question: Any) -> Any:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    (answer,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**question)]), timeout=120)
    return answer


def health_of(channel: grpc.Channel, service: str) -> Any:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=120).status


def test_kserve_is_served_and_reflected_only_if_enabled(tmp_path: Path) -> None:
    with (
        serving(tmp_path) as (server, _),
        client_of(server) as client,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        assert client.is_server_ready()
        names = [service.name for service in reflected(channel, list_services="").list_services_response.service]
        assert {NAME, "img2img.v1.ImageToImageService"} < set(names)
        assert reflected(channel, file_containing_symbol=NAME).file_descriptor_response.file_descriptor_proto
        assert health_of(channel, NAME) == health_pb2.HealthCheckResponse.SERVING
    with (
        serving(tmp_path, kserve=False) as (server, _),
        client_of(server) as client,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        assert status_of(client.is_server_live) == "UNIMPLEMENTED"
        names = [service.name for service in reflected(channel, list_services="").list_services_response.service]
        assert NAME not in names


def test_tritonclient_is_imported_only_with_kserve_enabled(tmp_path: Path) -> None:
    """Up and serving, in an interpreter of its own."""
    program = """
import sys
from fakes import FakePipeline
from running import running, store
with running(lambda: store(m=FakePipeline()), kserve=sys.argv[1] == "on") as server:
    print(any(name.startswith("tritonclient") for name in sys.modules))
"""
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY / 'tests'}"}
    for kserve, wanted in (("off", "False"), ("on", "True")):
        command = [sys.executable, "-c", program, kserve]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, cwd=tmp_path)
        assert (result.returncode, result.stdout.strip()) == (0, wanted), result.stderr


@pytest.mark.parametrize("missing", ["tritonclient", "tritonclient.grpc", "tritonclient.grpc.service_pb2"])
def test_missing_extra_is_reported_with_install_command(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tritonclient"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with (
        pytest.raises(ValueError, match=re.escape("kserve needs Triton's client: pip install 'img2img-server[kserve]'")),
        serving(tmp_path),
    ):
        pass


def test_a_server_that_drains_is_not_ready(tmp_path: Path) -> None:
    with (
        serving(tmp_path) as (server, loaded),
        client_of(server) as client,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=120)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        gate, told = Gate(loaded["m"]), queue.Queue[Any]()
        client.async_infer("m", [image_input()], lambda result, error: told.put(error))
        gate.wait_for_call()
        stopping = server.stop()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (client.is_server_live(), client.is_server_ready(), client.is_model_ready("m")) == (True, False, False)
        gate.open()
        assert told.get(timeout=120) is None, "what runs is finished"
        watch.cancel()
        stopping.result(60)


def test_token_permissions_apply_to_kserve(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    user = {"authorization": f"Bearer {grant(path, 'alice', models=('m',))}"}
    admin = {"authorization": f"Bearer {grant(path, 'root', admin=True)}"}
    with serving(tmp_path / "models", tokens=path) as (server, _), client_of(server) as client:
        for call in (client.is_server_live, client.get_server_metadata, lambda: client.infer("m", [image_input()])):
            assert status_of(call) == "UNAUTHENTICATED"
        assert client.infer("m", [image_input()], headers=user).as_numpy("seed").shape == (1,)
        assert [model.name for model in client.get_model_repository_index(headers=user).models] == ["m"]
        assert not client.is_model_ready("second", headers=user)
        assert status_of(lambda: client.get_model_metadata("second", headers=user)) == "NOT_FOUND"
        assert status_of(lambda: client.infer("second", [image_input()], headers=user)) == "PERMISSION_DENIED"
        assert status_of(lambda: client.load_model("m", headers=user)) == "PERMISSION_DENIED"
        assert status_of(lambda: client.unload_model("m", headers=user)) == "PERMISSION_DENIED"
        client.unload_model("second", headers=admin)
        assert not client.is_model_ready("second", headers=admin)
        client.load_model("second", headers=admin)
        assert client.is_model_ready("second", headers=admin)


def test_tritons_own_tls_options_work(tmp_path: Path) -> None:
    """Also with a client certificate."""
    authority = trustme.CA()
    paths = {name: tmp_path / f"{name}.pem" for name in ("ca", "server", "server_key", "client", "client_key")}
    authority.cert_pem.write_to_path(paths["ca"])
    for name, issued in (("server", authority.issue_cert("localhost")), ("client", authority.issue_cert("alice@example.org"))):
        issued.cert_chain_pems[0].write_to_path(paths[name])
        issued.private_key_pem.write_to_path(paths[f"{name}_key"])
        paths[f"{name}_key"].chmod(0o600)
    trusting = {"ssl": True, "root_certificates": str(paths["ca"])}
    showing = {"private_key": str(paths["client_key"]), "certificate_chain": str(paths["client"])}
    with serving(tmp_path / "models", tls=TlsSettings(paths["server"], paths["server_key"], paths["ca"])) as (server, _):
        with client_of(server, **trusting, **showing) as client:
            assert client.is_server_ready()
            assert client.infer("m", [image_input()]).as_numpy("images").shape == (1,)
        for settings in ({}, trusting):
            with client_of(server, **settings) as client:
                assert status_of(client.is_server_live) == "UNAVAILABLE"

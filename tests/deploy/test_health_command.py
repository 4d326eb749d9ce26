"""`img2img health` for probes: ready, busy and draining servers, with and without TLS."""

import argparse
import socket
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from fakes import FakePipeline
from grpc_health.v1 import health_pb2, health_pb2_grpc
from img2img_client import health_command
from img2img_client.client import Client
from img2img_server.config import TlsSettings
from PIL import Image
from running import RunningServer, running, store

_STATES = health_pb2.HealthCheckResponse


def health(*words: str) -> int:
    parser = argparse.ArgumentParser()
    health_command.configure(parser)
    return health_command.run(parser.parse_args(words))


def at(server: RunningServer, timeout: str = "30") -> tuple[str, ...]:
    return ("--target", f"localhost:{server.port}", "--timeout", timeout)


def test_ready_server_is_healthy_without_output(capsys: pytest.CaptureFixture[str]) -> None:
    with running(lambda: store(m=FakePipeline())) as server:
        assert health(*at(server)) == 0
    assert capsys.readouterr() == ("", "")


def test_unreachable_server_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        assert health("--target", f"127.0.0.1:{taken.getsockname()[1]}", "--timeout", "0.2") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("img2img health: ")


def test_busy_server_is_healthy_but_a_draining_one_is_not() -> None:
    pipeline, begun, go_on = FakePipeline(), threading.Event(), threading.Event()

    def compute() -> None:
        begun.set()
        go_on.wait(60)

    pipeline.before_call = compute
    with running(lambda: store(m=pipeline)) as server, ThreadPoolExecutor(1) as callers:
        try:
            with Client(f"localhost:{server.port}") as client:
                answer = callers.submit(
                    client.transform, Image.new("RGB", (16, 16)), prompt="a lake", strength=1.0, num_inference_steps=1
                )
                assert begun.wait(60)
                assert health(*at(server)) == 0
                states = watched(server)
                assert next(states) == _STATES.SERVING
                drained = server.stop()
                assert next(states) == _STATES.NOT_SERVING
                states.close()  # the server waits for watchers
                assert health(*at(server, "0.2")) == 1
                go_on.set()
                assert len(answer.result(60).images) == 1
                drained.result(60)
        finally:
            go_on.set()


def test_health_over_tls_uses_the_probes_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of components/tls: the secret's ca.crt, and a certificate with the name localhost."""
    authority = trustme.CA()
    issued = authority.issue_cert("img2img-headless.img2img.svc", "localhost")
    (tmp_path / "tls.crt").write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    (tmp_path / "tls.key").write_bytes(issued.private_key_pem.bytes())
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    with running(lambda: store(m=FakePipeline()), tls=TlsSettings(tmp_path / "tls.crt", tmp_path / "tls.key")) as server:
        monkeypatch.setenv("IMG2IMG_TARGET", f"https://localhost:{server.port}")
        assert health("--timeout", "0.5") == 1, "nobody vouches for the certificate"
        monkeypatch.setenv("IMG2IMG_CA", str(tmp_path / "ca.crt"))
        assert health("--timeout", "30") == 0


def watched(server: RunningServer) -> Generator[int, None, None]:
    """The health of the server, whenever it changes."""
    with grpc.insecure_channel(f"localhost:{server.port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for answer in stub.Watch(health_pb2.HealthCheckRequest(service=""), timeout=60):
            yield answer.status

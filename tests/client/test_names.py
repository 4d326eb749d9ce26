"""Servers addressed by DNS name: all addresses are used, service configs only on request, and certificates are always checked
against the name."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from blocking import Blocking
from fake_image_service import FakeServer
from fake_statuses import unavailable
from img2img_cli.__main__ import main
from img2img_client import Client, Img2ImgError, RetryPolicy, Unavailable
from name_server import TXT, NameServer, name_server
from several import counts, forget, started, use


@contextmanager
def headless() -> Iterator[tuple[list[FakeServer], NameServer, str]]:
    """Three servers on one port, a name that resolves to two of them, and its target."""
    first = FakeServer(host="127.0.0.1")
    more = [FakeServer(first.port, host=host) for host in ("127.0.0.2", "127.0.0.3")]
    with started(first, *more) as servers, name_server("127.0.0.1", "127.0.0.2") as names:
        yield servers, names, f"dns://{names.authority}/img2img.test:{first.port}"


@pytest.mark.parametrize("kind", [Client, Blocking])
def test_dns_name_balances_over_all_its_addresses(kind: Any) -> None:
    with headless() as (servers, names, target):
        with kind(target, timeout=120) as client:
            use(client, servers[:2])
            assert counts(servers[2:]) == [0]
            assert TXT not in names.asked
        forget(servers)
        with kind(target, timeout=120, balance=False) as client:
            for _ in range(20):
                client.models()
        assert sorted(counts(servers)) == [0, 0, 20]


def test_a_name_is_looked_up_again_when_a_server_goes() -> None:
    with headless() as (servers, names, target), Client(target, timeout=120) as client:
        use(client, servers[:2])
        names.addresses = ["127.0.0.2", "127.0.0.3"]
        servers[0].stop()
        use(client, servers[1:])


def test_service_config_from_dns_is_used_only_on_request() -> None:
    config: dict[str, object] = {"loadBalancingConfig": [{"pick_first": {}}], "methodConfig": []}
    with headless() as (servers, names, target):
        names.text = json.dumps([{"serviceConfig": config}])
        policy = RetryPolicy(5, 0.001, 0.002)
        with Client(target, timeout=120, dns_service_config=True, retries=policy) as client:
            for _ in range(20):
                client.models()
            assert sorted(counts(servers)) == [0, 0, 20]
            forget(servers)
            for server in servers:
                server.service.failure = unavailable()
            with pytest.raises(Unavailable):
                client.transform(b"file")
            assert sum(counts(servers)) == 5, "attempts of ours, as nobody knows of others"
        assert TXT in names.asked


def test_without_a_dns_service_config_only_the_client_retries() -> None:
    """gRPC's own retries are off then, since a service config from DNS could add attempts that the client does not count."""
    with headless() as (servers, names, target):
        for server in servers:
            server.service.failure = unavailable()
        policy = RetryPolicy(5, 0.001, 0.002)
        with Client(target, timeout=120, dns_service_config=True, retries=policy) as client, pytest.raises(Unavailable):
            client.transform(b"file")
        assert TXT in names.asked
        assert sum(counts(servers)) == 5


def test_server_name_sets_the_expected_certificate_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    authority = trustme.CA()
    own = authority.issue_cert("img2img.internal")
    pair = (own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes())
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    with started(*(FakeServer(credentials=grpc.ssl_server_credentials([pair])) for _ in range(2))) as servers:
        targets = [f"https://{server.target}" for server in servers]
        with Client(targets, credentials=credentials, server_name="img2img.internal", timeout=120) as client:
            use(client, servers)
        with Client(targets, credentials=credentials, server_name="other", timeout=120) as client, pytest.raises(Img2ImgError):
            client.models()
        with pytest.raises(ValueError, match="server_name is missing"):
            Client(targets, credentials=credentials)
        assert counts(servers) == [0, 0]
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        command = ["models", f"--target={','.join(targets)}", f"--ca={tmp_path / 'ca.pem'}", "--timeout=120"]
        assert main(command) == 2
        assert "server_name is missing" in capsys.readouterr().err
        assert main([*command, "--server-name=img2img.internal"]) == 0
        assert sum(counts(servers)) == 1

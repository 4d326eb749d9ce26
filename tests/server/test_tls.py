"""TLS on the port: client certificates, renewal while running, and addresses that need no TLS."""

import contextlib
import logging
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from fakes import FakePipeline
from grpc_health.v1 import health_pb2, health_pb2_grpc
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server.api.tls import bind, check, is_local
from img2img_server.config import ServerConfig, TlsSettings
from img2img_server.models.registry import ModelRegistry
from img2img_server.support.listen_addresses import address_of
from messages import request
from running import RunningServer, running, store

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def issue(folder: Path, authority: trustme.CA, name: str = "server") -> TlsSettings:
    """Writes a new certificate of localhost's and its key, each in one rename."""
    issued = authority.issue_cert("localhost", "127.0.0.1")
    settings = TlsSettings(folder / f"{name}.pem", folder / f"{name}.key")
    assert settings.certificate is not None
    assert settings.key is not None
    chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
    for path, data in ((settings.certificate, chain), (settings.key, issued.private_key_pem.bytes())):
        part = path.with_suffix(".part")
        part.write_bytes(data)
        part.chmod(0o600)
        part.replace(path)
    return settings


@contextlib.contextmanager
def serving(tls: TlsSettings, load: Callable[[], ModelRegistry] = lambda: store(m=FakePipeline())) -> Iterator[RunningServer]:
    with running(load, tls=tls) as server:
        yield server


def trusting(authority: trustme.CA, client: trustme.LeafCert | None = None) -> grpc.ChannelCredentials:
    """Credentials of a client that trusts `authority`, and shows the certificate `client`."""
    if client is None:
        return grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    chain = b"".join(pem.bytes() for pem in client.cert_chain_pems)
    return grpc.ssl_channel_credentials(authority.cert_pem.bytes(), client.private_key_pem.bytes(), chain)


def health(channel: grpc.Channel) -> Any:
    status: Any = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=120).status  # type: ignore[attr-defined]
    return status


def refused(channel: grpc.Channel) -> bool:
    with pytest.raises(grpc.RpcError) as caught:
        health(channel)
    error: Any = caught.value
    return bool(error.code() == grpc.StatusCode.UNAVAILABLE)


def shown(server: RunningServer, authority: trustme.CA, host: str = "127.0.0.1") -> bytes:
    """The certificate that a new connection is shown, in DER."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, server.port), timeout=120) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        found = secure.getpeercert(binary_form=True)
        assert found is not None
        return found


def der(path: Path | None) -> bytes:
    assert path is not None
    first, end, _ = path.read_text().partition("-----END CERTIFICATE-----\n")
    return ssl.PEM_cert_to_DER_cert(first + end)


def test_only_tls_clients_that_trust_the_authority_connect(tmp_path: Path, authority: trustme.CA) -> None:
    with serving(issue(tmp_path, authority)) as server:
        target = f"localhost:{server.port}"
        with grpc.secure_channel(target, trusting(authority)) as channel:
            assert health(channel) == SERVING
            assert ImageToImageServiceStub(channel).Transform(request(), timeout=120).images
        with grpc.secure_channel(target, trusting(trustme.CA())) as channel:
            assert refused(channel)
        with grpc.insecure_channel(target) as channel:
            assert refused(channel)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_tls_below_1_2_is_refused(version: ssl.TLSVersion, tmp_path: Path, authority: trustme.CA) -> None:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with serving(issue(tmp_path, authority)) as server:
        for allowed, highest in ((True, ssl.TLSVersion.TLSv1_2), (False, version)):
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = highest
            outcome = contextlib.nullcontext() if allowed else pytest.raises((ssl.SSLError, ConnectionError))
            with socket.create_connection(("127.0.0.1", server.port), timeout=120) as plain, outcome:
                context.wrap_socket(plain, server_hostname="localhost").close()


def test_client_certificates_of_other_authorities_are_refused(tmp_path: Path, authority: trustme.CA) -> None:
    clients = trustme.CA()
    (tmp_path / "clients.pem").write_bytes(clients.cert_pem.bytes())
    tls = issue(tmp_path, authority)
    with serving(TlsSettings(tls.certificate, tls.key, tmp_path / "clients.pem")) as server:
        target = f"localhost:{server.port}"
        with grpc.secure_channel(target, trusting(authority, clients.issue_cert("alice@example.org"))) as channel:
            assert health(channel) == SERVING
        for stranger in (None, trustme.CA().issue_cert("alice@example.org")):
            with grpc.secure_channel(target, trusting(authority, stranger)) as channel:
                assert refused(channel)


def _in_place(folder: Path, authority: trustme.CA) -> None:
    issue(folder, authority)


def _by_symlink(folder: Path, authority: trustme.CA) -> None:
    """Like Kubernetes' renewal of a mounted secret: `..data` is a link to a folder, and another link is renamed over it."""
    (folder / "new").mkdir()
    issue(folder / "new", authority)
    link = folder / "..data.part"
    link.symlink_to("new")
    link.replace(folder / "..data")


@pytest.mark.parametrize("renew", [_in_place, _by_symlink])
def test_renewed_certificate_applies_to_new_connections_only(
    renew: Callable[[Path, trustme.CA], None], tmp_path: Path, authority: trustme.CA
) -> None:
    tls = issue(tmp_path, authority)
    if renew is _by_symlink:
        (tmp_path / "old").mkdir()
        issue(tmp_path / "old", authority)
        (tmp_path / "..data").symlink_to("old")
        for path in (tls.certificate, tls.key):
            assert path is not None
            path.unlink()
            path.symlink_to(Path("..data") / path.name)
    pipeline = FakePipeline()
    called, go = threading.Event(), threading.Event()

    def wait() -> None:
        called.set()
        assert go.wait(60)

    pipeline.before_call = wait
    with (
        running(lambda: store(m=pipeline), tls=tls, host="localhost") as server,
        grpc.secure_channel(f"localhost:{server.port}", trusting(authority)) as channel,
    ):
        old = der(tls.certificate)
        assert shown(server, authority) == old
        running_call = ImageToImageServiceStub(channel).TransformStream(pb.TransformStreamRequest(request=request()), timeout=60)
        assert called.wait(120)
        renew(tmp_path, authority)
        new = der(tls.certificate)
        assert new != old
        assert [shown(server, authority), shown(server, authority)] == [new, new]
        if _has_ipv6():
            assert shown(server, authority, "::1") == new
        go.set()
        assert list(running_call)[-1].WhichOneof("event") == "completed"
        assert health(channel) == SERVING


def _has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as probe, contextlib.suppress(OSError):
        probe.bind(("::1", 0))
        return True
    return False


def test_broken_renewal_keeps_the_old_certificate_and_is_logged_once(
    tmp_path: Path, authority: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    tls = issue(tmp_path, authority)
    other = issue(tmp_path, authority, "other")
    assert tls.certificate is not None
    assert other.certificate is not None
    assert tls.key is not None
    assert other.key is not None
    good, good_key = tls.certificate.read_bytes(), tls.key.read_bytes()
    with serving(tls) as server, caplog.at_level(logging.INFO, logger="img2img_server.support.file_reloader"):
        old = der(tls.certificate)
        for broken in (other.certificate.read_bytes(), good[: len(good) // 2], b"", None):
            caplog.clear()
            tls.certificate.unlink()
            if broken is not None:
                tls.certificate.write_bytes(broken)
            assert [shown(server, authority) for _ in range(3)] == [old] * 3
            (line,) = caplog.messages
            assert "keeping the previous version" in line
            tls.certificate.write_bytes(good)
            assert shown(server, authority) == old
        # The other half of the renewal arrives: now both are used.
        tls.certificate.write_bytes(other.certificate.read_bytes())
        tls.key.write_bytes(other.key.read_bytes())
        assert shown(server, authority) == der(other.certificate)
        tls.certificate.write_bytes(good)
        tls.key.write_bytes(good_key)
        assert shown(server, authority) == old


def test_client_authority_is_reloaded(tmp_path: Path, authority: trustme.CA) -> None:
    """A client of the old authority is refused, although its TLS session could be resumed."""
    before, after = trustme.CA(), trustme.CA()
    clients = tmp_path / "clients.pem"
    clients.write_bytes(before.cert_pem.bytes())
    tls = issue(tmp_path, authority)
    credentials = trusting(authority, before.issue_cert("alice@example.org"))
    with serving(TlsSettings(tls.certificate, tls.key, clients)) as server:
        target = f"localhost:{server.port}"
        with grpc.secure_channel(target, credentials, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            assert health(channel) == SERVING
        clients.write_bytes(after.cert_pem.bytes())
        with grpc.secure_channel(target, credentials, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            assert refused(channel)
        with grpc.secure_channel(target, trusting(authority, after.issue_cert("bob@example.org"))) as channel:
            assert health(channel) == SERVING


def test_key_readable_by_other_users_logs_a_warning(
    tmp_path: Path, authority: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    tls = issue(tmp_path, authority)
    assert tls.key is not None
    with serving(tls):
        assert "chmod" not in caplog.text
    tls.key.chmod(0o644)
    with serving(tls):
        assert f"{tls.key} is readable or writable by other users" in caplog.text


def _garbage(folder: Path, authority: trustme.CA) -> TlsSettings:
    (folder / "bad.pem").write_text("garbage")
    return TlsSettings(folder / "bad.pem", issue(folder, authority).key)


def _of_another(folder: Path, authority: trustme.CA) -> TlsSettings:
    return TlsSettings(issue(folder, authority).certificate, issue(folder, authority, "other").key)


def _missing(folder: Path, authority: trustme.CA) -> TlsSettings:
    return TlsSettings(issue(folder, authority).certificate, folder / "nothing.key")


def _no_authority(folder: Path, authority: trustme.CA) -> TlsSettings:
    tls = issue(folder, authority)
    (folder / "empty.pem").write_text("nothing\n")
    return TlsSettings(tls.certificate, tls.key, folder / "empty.pem")


def _encrypted(folder: Path, authority: trustme.CA) -> TlsSettings:
    from cryptography.hazmat.primitives import serialization as kinds

    tls = issue(folder, authority)
    assert tls.key is not None
    key = kinds.load_pem_private_key(tls.key.read_bytes(), None)
    form = kinds.PrivateFormat.TraditionalOpenSSL
    tls.key.write_bytes(key.private_bytes(kinds.Encoding.PEM, form, kinds.BestAvailableEncryption(b"secret")))
    return tls


@pytest.mark.parametrize(
    ("make", "error", "why"),
    [(_garbage, ValueError, "do not match, or are not PEM"),
         (_of_another, ValueError, "do not match, or are not PEM: key values mismatch"),
     (_missing, OSError, "nothing.key cannot be read"),
     (_no_authority, ValueError, "tls_client_ca .*empty.pem contains no PEM certificate"),
     (_encrypted, ValueError, "is encrypted")],
)  # fmt: skip
def test_invalid_tls_files_are_an_error_before_models_are_loaded(
    make: Callable[[Path, trustme.CA], TlsSettings], error: type[Exception], why: str, tmp_path: Path, authority: trustme.CA
) -> None:
    loaded = []

    def load() -> ModelRegistry:
        loaded.append(1)
        return store(m=FakePipeline())

    with pytest.raises(error, match=why) as caught, serving(make(tmp_path, authority), load):
        raise AssertionError("it must not start")
    assert "\n" not in str(caught.value)
    assert not loaded


LOCAL = ("127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost", "::ffff:127.0.0.1", "unix:/run/img2img.sock")
NOT_LOCAL = ("0.0.0.0", "::", "[::]", "::ffff:0.0.0.0", "10.0.0.1", "169.254.1.1", "fe80::1", "8.8.8.8", "example.org",
             "localhost.example.org", "127.1", "0", "0x7f000001", "LOCALHOST.", "dns:///localhost", "vsock:1:2")  # fmt: skip


@pytest.mark.parametrize("host", LOCAL)
def test_loopback_needs_no_tls(host: str) -> None:
    assert is_local(host)
    check(ServerConfig(host=host))


@pytest.mark.parametrize("host", NOT_LOCAL)
def test_plaintext_beyond_loopback_needs_permission(host: str, tmp_path: Path, authority: trustme.CA) -> None:
    assert not is_local(host)
    with pytest.raises(ValueError, match="tls_certificate and tls_key, or set allow_insecure"):
        check(ServerConfig(host=host))
    check(ServerConfig(host=host, allow_insecure=True))
    check(ServerConfig(host=host, tls=issue(tmp_path, authority)))


async def test_bind_validates_host_port_and_tls() -> None:
    server = grpc.aio.server()
    with pytest.raises(ValueError, match="allow_insecure"):
        bind(server, ServerConfig(host="0.0.0.0", port=0))
    with pytest.raises(ValueError, match="port is 70000, the maximum is 65535"):
        bind(server, ServerConfig(port=70000))
    with pytest.raises(ValueError, match="host is empty"):
        bind(server, ServerConfig(host="", port=0))
    await server.stop(0)


def test_plaintext_beyond_loopback_logs_a_warning(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text("")
    with running(lambda: store(m=FakePipeline()), host="0.0.0.0", allow_insecure=True):
        assert "without TLS and without tokens" in caplog.text
    caplog.clear()
    with running(lambda: store(m=FakePipeline()), host="0.0.0.0", allow_insecure=True, tokens=tokens):
        assert "are sent to 0.0.0.0 without encryption" in caplog.text
    caplog.clear()
    with running(lambda: store(m=FakePipeline()), tokens=tokens):
        assert "without encryption" not in caplog.text


def test_a_unix_socket_and_ipv6_can_be_listened_on(tmp_path: Path) -> None:
    assert (address_of("::1", 5), address_of("[::1]", 5), address_of("127.0.0.1", 5)) == ("[::1]:5", "[::1]:5", "127.0.0.1:5")
    path = os.path.relpath(tmp_path / "socket")  # the whole path may be longer than the 107 bytes of a socket's
    with running(lambda: store(m=FakePipeline()), host=f"unix:{path}"), grpc.insecure_channel(f"unix:{path}") as channel:
        assert health(channel) == SERVING
    if _has_ipv6():
        with (
            running(lambda: store(m=FakePipeline()), host="::1") as server,
            grpc.insecure_channel(f"[::1]:{server.port}") as channel,
        ):
            assert health(channel) == SERVING

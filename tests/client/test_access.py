"""TLS and tokens of the client: trusted authorities, client certificates, and no token over plaintext."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from fake_image_service import FakeServer, FakeService, image_bytes
from img2img_cli.__main__ import main
from img2img_client import Client, Unauthenticated, Unavailable
from img2img_client.channel import Access
from img2img_client.targets import is_loopback

TOKEN = "secret-token"


@dataclass(frozen=True, slots=True)
class Files:
    """An authority's certificate, and a client's certificate and key that it signed."""

    ca: Path
    certificate: Path
    key: Path


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("pem")
    files = Files(folder / "ca.pem", folder / "client.pem", folder / "client.key")
    authority.cert_pem.write_to_path(str(files.ca))
    shown = authority.issue_cert("client@example.org")
    shown.cert_chain_pems[0].write_to_path(str(files.certificate))
    shown.private_key_pem.write_to_path(str(files.key))
    return files


@contextmanager
def secure_server(authority: trustme.CA, mutual: bool = False) -> Iterator[FakeServer]:
    """A fake server with a certificate for 127.0.0.1; `mutual` wants one of the client, too."""
    own = authority.issue_cert("127.0.0.1", "localhost")
    pair = (own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes())
    roots = authority.cert_pem.bytes() if mutual else None
    server = FakeServer(credentials=grpc.ssl_server_credentials([pair], roots, mutual))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def secure(authority: trustme.CA) -> Iterator[FakeServer]:
    with secure_server(authority) as server:
        yield server


@pytest.fixture
def mutual(authority: trustme.CA) -> Iterator[FakeServer]:
    with secure_server(authority, mutual=True) as server:
        yield server


@pytest.mark.parametrize("scheme", ["", "https://"])
def test_server_certificate_of_a_trusted_authority_is_accepted(secure: FakeServer, files: Files, scheme: str) -> None:
    secure.service.token = TOKEN
    with Client(scheme + secure.target, ca=files.ca, token=TOKEN, timeout=120) as client:
        assert client.models() == ()
        assert client.transform(b"file").request_id == "made"
        client.wait_until_ready(20)


def test_server_certificate_of_another_authority_is_refused(secure: FakeServer, tmp_path: Path) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    for ca in (tmp_path / "other.pem", None):
        client = Client(f"https://{secure.target}", ca=ca, token=TOKEN, timeout=120, retries=None)
        with client, pytest.raises(Unavailable):
            client.models()
    assert secure.service.metadata == []


def test_client_certificate_is_sent_for_mutual_tls(mutual: FakeServer, files: Files) -> None:
    with Client(mutual.target, ca=files.ca, timeout=120, retries=None) as client, pytest.raises(Unavailable):
        client.models()
    with Client(mutual.target, ca=files.ca, certificate=str(files.certificate), key=str(files.key), timeout=120) as client:
        assert client.models() == ()


def test_http_scheme_means_plaintext(server: FakeServer) -> None:
    with Client(f"http://{server.target}/", token=TOKEN, timeout=120) as client:
        assert client.models() == ()


def test_every_call_sends_the_token(server: FakeServer) -> None:
    server.service.token = server.assets.token = TOKEN
    with Client(server.target, token=TOKEN, timeout=120) as client:
        client.models()
        client.transform(b"file")
        list(client.transform_stream(b"file"))
        client.download(client.upload(b"file"))
    assert [sent["authorization"] for sent in server.service.metadata + server.assets.metadata] == [f"Bearer {TOKEN}"] * 5


@pytest.mark.parametrize("token", [None, "wrong"])
def test_call_without_a_valid_token_is_unauthenticated(server: FakeServer, token: str | None) -> None:
    server.service.token = TOKEN
    with Client(server.target, token=token, timeout=120) as client:
        for call in (client.models, lambda: client.transform(b"file")):
            with pytest.raises(Unauthenticated):
                call()
    assert len(server.service.metadata) == 2


@pytest.mark.parametrize(
    "target",
    [
        "example.org:50051",
        "http://example.org:50051",
        "10.0.0.1:50051",
        "127.0.0.1.example.org:50051",
        "dns://8.8.8.8/localhost:1",
    ],
)
def test_a_token_never_goes_over_a_network_in_plain_text(target: str) -> None:
    with pytest.raises(ValueError, match="plaintext") as caught:
        Client(target, token=TOKEN)
    assert TOKEN not in str(caught.value)
    Client(target, token=TOKEN, allow_insecure_token=True).close()
    Client(target).close()


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("localhost:50051", True),
        ("localhost", True),
        ("127.0.0.1:50051", True),
        ("127.8.9.1", True),
        ("[::1]:50051", True),
        ("unix:/run/img2img.sock", True),
        ("unix-abstract:img2img", True),
        ("dns:///localhost:50051", True),
        ("dns:localhost:50051", True),
        ("ipv4:127.0.0.1:50051", True),
        ("ipv6:[::1]:50051", True),
        ("ipv4:127.0.0.1:50051,127.0.0.2:50051", True),
        ("ipv4:127.0.0.1:50051,10.0.0.1:50051", False),
        ("dns://10.0.0.1/localhost:50051", False),
        ("localhost.example.org:50051", False),
        ("127.evil.example.org:50051", False),
        ("127.1:50051", False),
        ("[::ffff:10.0.0.1]:50051", False),
        ("[::1]example.org:50051", False),
        ("localhost:50051@example.org", False),
        ("xds:localhost:50051", False),
        ("192.168.0.1:50051", False),
        ("", False),
    ],
)
def test_loopback_targets_are_recognized(target: str, local: bool) -> None:
    assert is_loopback(target) is local


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"certificate": "a.pem"}, "must be given together"),
        ({"key": "a.key"}, "must be given together"),
        ({"ca": "a.pem", "credentials": grpc.ssl_channel_credentials()}, "cannot be combined"),
        ({"token": ""}, "token must consist of"),
        ({"token": "se cret"}, "token must consist of"),
        ({"token": "secret\n"}, "token must consist of"),
        ({"token": "sécret"}, "token must consist of"),
    ],
)
def test_contradictory_settings_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        Client(**settings)
    assert "cret" not in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.pem"):
        Client(ca=tmp_path / "missing.pem")


def test_a_token_is_not_printed() -> None:
    access = Access(token=TOKEN)
    with Client(token=TOKEN) as client:
        assert all(TOKEN not in text for text in (repr(access), str(access), repr(client), repr(vars(client))))


def command(*words: str) -> int:
    return main(["models", "--timeout=120", "--retries=0", *words])


def test_flags_reach_the_channel(mutual: FakeServer, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mutual.service.token = TOKEN
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    flags = [f"--target={mutual.target}", f"--ca={files.ca}", f"--client-certificate={files.certificate}"]
    assert command(*flags, f"--client-key={files.key}", f"--token-file={tmp_path / 'token'}") == 0
    assert command(*flags, f"--client-key={files.key}") == 1
    assert "no token that is known (set --token-file or $IMG2IMG_TOKEN)" in capsys.readouterr().err
    assert command(*flags) == 2
    assert "must be given together" in capsys.readouterr().err
    assert command(*flags, f"--client-key={tmp_path / 'missing.key'}") == 1
    assert f"{tmp_path / 'missing.key'}: No such file" in capsys.readouterr().err


def test_environment_variables_replace_flags(
    mutual: FakeServer, files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mutual.service.token = TOKEN
    variables = {
        "TARGET": f"https://{mutual.target}",
        "TOKEN": TOKEN,
        "CA": str(files.ca),
        "CLIENT_CERTIFICATE": str(files.certificate),
        "CLIENT_KEY": str(files.key),
    }
    for name, value in variables.items():
        monkeypatch.setenv(f"IMG2IMG_{name}", value)
    assert command() == 0
    (tmp_path / "token").write_text("another")
    assert command(f"--token-file={tmp_path / 'token'}") == 1
    assert command("--target=127.0.0.1:1") == 1


def test_a_token_for_another_machine_needs_tls(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("IMG2IMG_TOKEN", TOKEN)
    assert command("--target=example.org:1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "plaintext" in line
    assert TOKEN not in line


def test_no_flag_takes_a_token_value(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(image_bytes())
    with pytest.raises(SystemExit):
        main(["transform", str(tmp_path / "photo.png"), "--output=-", f"--target={server.target}", f"--token={TOKEN}"])


def test_caller_can_set_the_request_id(client: Client, service: FakeService) -> None:
    assert client.transform(b"file", request_id="a.b:c_d-1").request_id == "a.b:c_d-1"
    with client.transform_stream(b"file", request_id="mine") as events:
        assert events.request_id == ""
        *_, completed = events
    assert completed.result.request_id == events.request_id == "mine"  # type: ignore[union-attr]
    assert client.transform(b"file").request_id == "made"
    for name in ("", "a b", "ä", "a\nb", "a" * 65):
        with pytest.raises(ValueError, match="request_id"):
            client.transform(b"file", request_id=name)
        with pytest.raises(ValueError, match="request_id"):
            client.transform_stream(b"file", request_id=name)
    assert len(service.requests) == 3

"""Node with the packages that clients/node pins, and servers: a real one with a fake model, one with TLS and tokens, and a
scripted one."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from conftest import REPOSITORY
from fake_image_service import FakeServer
from fakes import FakePipeline
from granting import grant
from img2img_server.config import AssetSettings, TlsSettings
from other_clients import CLIENTS, Finished, HeldPipeline, Run, Secured, environment, holding
from running import RunningServer, running, store


@pytest.fixture(scope="session")
def node() -> Path:
    """Node itself, with the packages of clients/node in place."""
    command = [str(REPOSITORY / "scripts" / "node"), "--print", "process.execPath"]
    return Path(subprocess.run(command, check=True, timeout=200, stdout=subprocess.PIPE, text=True).stdout.strip())


@pytest.fixture
def run(node: Path, tmp_path: Path) -> Run:
    def run(program: str, *arguments: object, target: str = "") -> Finished:
        if "\n" in program:
            program = program.replace("img2img-client", (CLIENTS / "node" / "src" / "index.js").as_uri())
            command = ["--input-type=module", "--eval", program, "--"]
        else:
            command = [str(CLIENTS / "node" / "examples" / program)]
        return subprocess.run(
            [str(node), *command, *map(str, arguments)],
            cwd=tmp_path,
            env=environment(target),
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    assets = AssetSettings(url=str(tmp_path_factory.mktemp("assets")))
    with running(lambda: store(m=FakePipeline()), assets=assets) as server:
        yield server


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """A server with scripted responses."""
    server = FakeServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def held() -> Iterator[tuple[HeldPipeline, str]]:
    with holding() as made:
        yield made


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    (folder / "server.pem").write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(folder / "server.key")
    (folder / "server.key").chmod(0o600)
    (folder / "token.txt").write_text(grant(folder / "tokens.toml", "alice") + "\n")
    tls = TlsSettings(folder / "server.pem", folder / "server.key")
    with running(lambda: store(m=FakePipeline()), tls=tls, tokens=folder / "tokens.toml") as server:
        yield Secured(server.port, folder / "ca.pem", folder / "token.txt")

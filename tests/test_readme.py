"""Every command and program in README.md runs unchanged and in order, in its own folder.

Only these are changed: the ports, the seconds of measuring at start, and the two setup scripts. `./scripts/demo` has its own test
(tests/client/test_demo.py), and `./scripts/test` is what runs this one. The demo model's bundle is the shared one of the session,
which its export finds up to date; the nightly run exports it.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SCRIPTS = ("./scripts/demo", "./scripts/test")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the checkout after setup, which contains all written files."""
    for name in ("demo", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.fixture
def servers() -> Iterator[list["subprocess.Popen[bytes]"]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.terminate()
        assert process.wait(60) == 0


def _bash(command: str, folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "200"}
    result = subprocess.run(["bash", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


def _start(command: str, folder: Path) -> "tuple[subprocess.Popen[bytes], str]":
    port = folder / f"port-{len(list(folder.glob('port-*')))}"
    program, *words = shlex.split(command)
    words = [str(Path(sys.executable).parent / program), *words, "--port", "0", "--port-file", str(port), "--warm-up", "1"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(words, cwd=folder, stderr=log)
    while not port.exists():
        assert process.poll() is None, (folder / "log").read_text()
        time.sleep(0.05)
    return process, port.read_text().strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _certify(folder: Path) -> None:
    """Adds the user's own files: a certificate and its key."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    (folder / "server.pem").write_bytes(certificate.cert_chain_pems[0].bytes())
    certificate.private_key_pem.write_to_path(folder / "server.key")


@pytest.mark.parametrize("exported", ["before", pytest.param("here", marks=pytest.mark.nightly)])
def test_readme_commands_and_programs_work(
    exported: str, folder: Path, servers: "list[subprocess.Popen[bytes]]", bundle: Callable[[str], Path]
) -> None:
    if exported == "before":
        shutil.copytree(bundle("demo"), folder / "models" / "demo")
    port, said, http = "50051", "", _free_port()
    for language, block in BLOCKS:
        if block.strip() in SCRIPTS:
            continue
        block = block.replace("localhost:50051", f"localhost:{port}")
        block = block.replace("localhost:8000", f"localhost:{http}").replace("--http-port 8000", f"--http-port {http}")
        if language == "python":
            result = subprocess.run([sys.executable, "-c", block], cwd=folder, capture_output=True, text=True, timeout=120)
            assert result.returncode == 0, result.stderr
            said += result.stdout
            continue
        assert language == "sh", f"a block of {language} is run by nothing"
        commands = block.replace("\\\n", "").splitlines()
        if "--tls-certificate" in commands[-1]:
            _certify(folder)
            process, _ = _start(f"{commands[-1]} --metrics-port 0", folder)
            process.terminate()
            assert process.wait(60) == 0
        elif commands[-1].startswith("img2img serve") and "--print-config" not in commands[-1]:
            _bash("\n".join(commands[:-1]), folder)
            process, port = _start(commands[-1], folder)
            servers.append(process)
        else:
            _bash(
                re.sub(
                    r"^img2img (transform|models|assets \w+)\b",
                    rf"img2img \1 --server localhost:{port}",
                    block,
                    flags=re.MULTILINE,
                ),
                folder,
            )
    assert port != "50051", "the README starts a server"
    assert "step 20 of 20" in said
    for name in ("winter.png", "night.png"):
        with Image.open(folder / name) as made, Image.open(ROOT / "demo" / "images" / "noon-lake.png") as source:
            assert made.size == source.size


def test_readme_scripts_exist_and_run_in_ci() -> None:
    blocks = [block.strip() for _, block in BLOCKS]
    assert all(script in blocks for script in SCRIPTS)
    assert all(os.access(ROOT / script, os.X_OK) for script in SCRIPTS)
    ran = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "./scripts/test" in ran


def test_every_environment_of_the_tests_runs_in_ci_or_nightly() -> None:
    environments = {path.name for path in (ROOT / "scripts" / "test_environments").iterdir() if os.access(path, os.X_OK)}
    ran = re.findall(r"^\./scripts/test( --.*)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    in_ci = set(re.findall(r" --(\w+)", "".join(ran)))
    nightly = re.search(r"environments=\(([\w ]+)\)", (ROOT / "scripts" / "test").read_text())
    assert nightly is not None
    assert in_ci | set(nightly[1].split()) == environments
    assert in_ci.isdisjoint(nightly[1].split())

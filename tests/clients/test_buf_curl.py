"""Every block of clients/buf/README.md runs unchanged and in order against a real server, with the documented output."""

import shutil
import subprocess
import sys
from pathlib import Path

import grpc
from conftest import REPOSITORY
from other_clients import CLIENTS, IMAGE, Secured, blocks, environment
from PIL import Image, ImageChops
from running import RunningServer


def test_commands_of_the_buf_readme_work(server: RunningServer, secured: Secured, tmp_path: Path) -> None:
    (tmp_path / "demo").symlink_to(IMAGE.parents[1])
    shutil.copy(secured.ca, tmp_path / "ca.pem")
    shutil.copy(secured.token, tmp_path / "token.txt")
    told = []
    for block in blocks(CLIENTS / "buf" / "README.md", "sh"):
        command = block.replace("http://localhost:50051", f"http://localhost:{server.port}")
        command = command.replace("https://localhost:50051", f"https://localhost:{secured.port}")
        assert "50051" not in command
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=tmp_path,
            env=environment() | {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"
        told.append(result.stdout)
    listed, transformed, streamed, _, refused, secure = told
    assert "img2img.v1.ImageToImageService/TransformStream" in listed
    assert '"id": "m"' in listed
    assert '"status": "SERVING"' in listed
    assert transformed == ""
    with Image.open(tmp_path / "winter.png") as made, Image.open(IMAGE) as source:
        # The fake model returns the source.
        assert ImageChops.difference(made, source.convert("RGB")).getbbox() is None
    assert streamed.count('"step"') == int(4 * 0.8)
    assert "totalMs" in streamed
    assert "strength: 2.0 is not in (0, 1]" in refused
    assert '"id": "m"' in secure


def test_call_without_a_token_is_unauthenticated(secured: Secured) -> None:
    url = f"https://localhost:{secured.port}/img2img.v1.ModelService/ListModels"
    command = ["curl", "--protocol", "grpc", "--cacert", secured.ca, "--schema", REPOSITORY / "protos", url]
    result = subprocess.run(
        [str(Path(sys.executable).parent / "buf"), *map(str, command)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 8 * grpc.StatusCode.UNAUTHENTICATED.value[0]
    assert '"unauthenticated"' in result.stderr

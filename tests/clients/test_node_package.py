"""The Node client as a package: its page, its files, its pinned dependencies and its types."""

import json
import re
import shutil
import subprocess
import tarfile
import tomllib
from pathlib import Path

import pytest
from conftest import REPOSITORY
from google.protobuf.descriptor import Descriptor
from img2img.v1 import asset_pb2, image_to_image_pb2, model_pb2
from other_clients import CLIENTS, IMAGE, Secured, blocks, environment, succeeded
from running import RunningServer

SCRIPT = REPOSITORY / "scripts" / "node"

_MESSAGES = {
    name: message
    for file in (image_to_image_pb2, model_pb2, asset_pb2)
    for name, message in file.DESCRIPTOR.message_types_by_name.items()
}
_TYPES = re.findall(
    r"@typedef \{object\} (\w+)\n(.*?)\*/", (CLIENTS / "node" / "src" / "types.js").read_text(encoding="utf-8"), re.DOTALL
)


def test_commands_and_programs_of_the_node_readme_work(
    node: Path, server: RunningServer, secured: Secured, tmp_path: Path
) -> None:
    """Its commands run in the repository, its programs in a folder where the packed package is installed."""
    (tmp_path / "demo").symlink_to(IMAGE.parents[1])
    for block in blocks(CLIENTS / "node" / "README.md", "sh"):
        command = block.replace("scripts/node", str(SCRIPT)).replace("clients/node", str(CLIENTS / "node"))
        command = re.sub(r"127.0.0.1:\d+", f"127.0.0.1:{server.port}", command)
        result = subprocess.run(
            ["bash", "-euc", command],
            cwd=tmp_path,
            env=environment(f"localhost:{server.port}"),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, f"{block}\n{result.stderr}"
    assert (tmp_path / "winter.webp").exists()
    install(tmp_path)
    for name, path in (("noon-lake.png", IMAGE), ("ca.pem", secured.ca), ("token.txt", secured.token)):
        shutil.copy(path, tmp_path / name)
    told = []
    for block in blocks(CLIENTS / "node" / "README.md", "js"):
        program = block.replace('"localhost:50051"', f'"localhost:{server.port}"').replace(":50051", f":{secured.port}")
        (tmp_path / "program.mjs").write_text(program)
        result = subprocess.run(
            [node, "program.mjs"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
        )
        told += succeeded(result)
    assert "step 10 of 20" in told
    assert "step 11 of 20" not in told
    assert any(line.startswith("INVALID_ARGUMENT INVALID_FIELD") for line in told)
    assert told[-1] == "[ 'm' ]"


def install(folder: Path) -> None:
    """Packs a copy of clients/node as a person would, and puts it where programs in `folder` find it."""
    away = folder / "away"
    shutil.copytree(CLIENTS / "node", away / "clients" / "node", ignore=shutil.ignore_patterns("node_modules"))
    shutil.copytree(REPOSITORY / "protos", away / "protos", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "LICENSE", away)
    command = [str(SCRIPT), "npm", "pack", "./clients/node", "--offline", "--silent", "--pack-destination", str(folder)]
    subprocess.run(command, cwd=away, check=True, timeout=60, capture_output=True)
    shutil.rmtree(away)
    modules = folder / "node_modules"
    modules.mkdir()
    for entry in (CLIENTS / "node" / "node_modules").iterdir():
        (modules / entry.name).symlink_to(entry)
    (archive,) = folder.glob("img2img-client-*.tgz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    assert (folder / "package" / "LICENSE").read_bytes() == (REPOSITORY / "LICENSE").read_bytes()
    (folder / "package").rename(modules / "img2img-client")


def test_lock_pins_every_package_and_has_no_install_scripts() -> None:
    manifest = json.loads((CLIENTS / "node" / "package.json").read_text())
    lock = json.loads((CLIENTS / "node" / "package-lock.json").read_text())
    packages = {name: package for name, package in lock["packages"].items() if name}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert manifest["version"] == lock["version"] == project["version"], "one version for server and clients"
    assert manifest["license"] == lock["packages"][""]["license"] == project["license"]
    assert manifest["author"] == project["authors"][0]["name"]
    assert manifest["engines"]["node"]
    assert {f"node_modules/{name}" for name in manifest["dependencies"]} <= packages.keys()
    for name, package in packages.items():
        assert package["integrity"].startswith("sha512-"), name
    # It only looks at how versions are written; scripts/node runs it as little as any other.
    assert [name for name in packages if packages[name].get("hasInstallScript")] == ["node_modules/protobufjs"]
    assert ' ci --prefix "$package" --ignore-scripts ' in (REPOSITORY / "scripts" / "node").read_text()
    assert not {"preinstall", "install", "postinstall", "prepare"} & manifest["scripts"].keys()


@pytest.mark.parametrize(("name", "properties"), _TYPES, ids=[name for name, _ in _TYPES])
def test_the_types_have_the_fields_of_the_contract(name: str, properties: str) -> None:
    message: Descriptor = _MESSAGES[name]
    # proto-loader adds to a oneof of a response the name of the field that is set.
    oneofs = {one.name for one in message.oneofs if len(one.fields) > 1}
    named = re.findall(r"@property \{[^\n]*?\} \[?(\w+)", properties)
    assert len(named) == len(set(named))
    assert set(named) - oneofs == {field.name for field in message.fields}


def test_every_message_of_the_methods_has_a_type() -> None:
    typed = {name for name, _ in _TYPES}
    pending = [_MESSAGES[name] for name in ("TransformRequest", "TransformStreamResponse", "Model", "Asset")]
    while pending:
        message = pending.pop()
        assert message.name in typed
        pending += [field.message_type for field in message.fields if field.message_type and field.message_type.name in _MESSAGES]

"""The Containerfile is lint-free and matches the server, the lock and the project."""

import argparse
import fnmatch
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import REPOSITORY
from img2img_cli.__main__ import COMMANDS
from img2img_server.settings.sources import SettingError
from serving_settings import config_of

_PATH = REPOSITORY / "deploy" / "Containerfile"
_LINES = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", _PATH.read_text(encoding="utf-8"), flags=re.MULTILINE)).splitlines()
_INSTRUCTIONS = [(line.split()[0], line.partition(" ")[2].strip()) for line in _LINES if line.strip()]
_PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def arguments_of(name: str) -> list[str]:
    return [rest for instruction, rest in _INSTRUCTIONS if instruction == name]


def variables() -> dict[str, str]:
    return dict(part.split("=", 1) for line in arguments_of("ENV") for part in line.split())


def test_hadolint_reports_nothing() -> None:
    program = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([program, "--no-color", _PATH], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_there_are_two_targets_over_one_base() -> None:
    stages = {part.split()[2]: part.split()[0] for part in arguments_of("FROM")}
    assert {"cpu", "cuda"} <= stages.keys()
    assert stages["cpu"] == stages["cuda"] == "serving"
    assert [origin for origin in stages.values() if origin not in stages] == ["${BASE}"], "one base, which an argument pins"
    assert "BASE=docker.io/library/debian:bookworm-slim" in arguments_of("ARG")


def test_container_runs_unprivileged_and_stops_by_sigterm() -> None:
    user, _, group = arguments_of("USER")[-1].partition(":")
    assert int(user) == int(group) > 0
    assert arguments_of("STOPSIGNAL") == ["SIGTERM"]
    names = [name for name, _ in _INSTRUCTIONS]
    assert names.index("USER") > max(place for place, name in enumerate(names) if name == "RUN"), "nothing is run for its user"


def test_container_runs_our_commands_without_a_shell() -> None:
    (check,) = arguments_of("HEALTHCHECK")
    for words in (
        json.loads(arguments_of("ENTRYPOINT")[0]) + json.loads(arguments_of("CMD")[0]),
        json.loads(check.partition("CMD ")[2]),
    ):
        assert words[0] == "img2img"
        parser = argparse.ArgumentParser()
        importlib.import_module(COMMANDS[words[1]][0]).configure(parser)
        parser.parse_args(words[2:])


def test_container_config_is_valid_and_written_paths_are_volumes() -> None:
    own = {name: value for name, value in variables().items() if name.startswith("IMG2IMG_")}
    assert own == {"IMG2IMG_CONFIG": "/etc/img2img/server.toml"}
    assert "deploy/server.toml /etc/img2img/server.toml" in arguments_of("COPY")
    config = config_of([], own, REPOSITORY / "deploy" / "server.toml")
    volumes = json.loads(arguments_of("VOLUME")[0])
    assert sorted(volumes) == sorted([str(config.models), str(config.assets.url), variables()["XDG_CACHE_HOME"]])
    assert arguments_of("EXPOSE") == [f"{config.port} {config.telemetry.metrics_port}"]
    assert variables()["PYTHONDONTWRITEBYTECODE"] == "1"
    assert config.host == "0.0.0.0"
    assert not config.allow_insecure, "who runs it gives TLS, or says that it is not needed"


def test_unknown_settings_of_the_container_image_are_detected(tmp_path: Path) -> None:
    wrong = tmp_path / "server.toml"
    wrong.write_text((REPOSITORY / "deploy" / "server.toml").read_text(encoding="utf-8") + "\n[telemetri]\n", encoding="utf-8")
    with pytest.raises(SettingError, match="telemetri"):
        config_of([], {}, wrong)


def test_copied_files_exist_and_are_not_ignored() -> None:
    ignored = (_PATH.parent / "Containerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    sources = [part for line in arguments_of("COPY") if not line.startswith("--from") for part in line.split()[:-1]]
    for source in sources:
        assert (REPOSITORY / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) for pattern in allowed), f"{source} would not be sent"
    packages = {package.partition("/")[0] for package in _PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    assert packages <= set(sources), "img2img's own wheel is whole"
    assert {_PROJECT["project"]["readme"], *_PROJECT["project"]["license-files"]} <= set(sources), "its metadata names them"


def test_container_versions_match_the_project() -> None:
    arguments = dict(line.partition("=")[::2] for line in arguments_of("ARG"))
    assert arguments["UV"] == (REPOSITORY / "scripts" / "uv-version").read_text(encoding="utf-8").strip()
    assert arguments["VERSION"] == _PROJECT["project"]["version"]
    assert "Programming Language :: Python :: 3.11" in _PROJECT["project"]["classifiers"]
    assert all("python3.11" in line for line in arguments_of("RUN") if "apt-get install" in line), "what Debian 12 has"
    assert f'org.opencontainers.image.licenses="{_PROJECT["project"]["license"]}"' in " ".join(arguments_of("LABEL"))

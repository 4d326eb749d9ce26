"""The distribution's name, and the install commands in code and documentation."""

import re
import tomllib
from importlib import metadata

import pytest
from conftest import REPOSITORY
from img2img_server.support import distribution

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
_REQUIREMENT = re.compile(r"(?<![\w./-])(?P<name>\.|img2img[a-z-]*)\[(?P<extras>[a-z][a-z0-9,-]*)\]")
"""Our distribution with extras, by name or, from a checkout, by path."""
_BARE = re.compile(r"pip install (?:-U |--upgrade )?['\"]?(img2img[\w-]*)")


_FOLDERS = (
    "benchmarks",
    "benchmarks",
    "cli",
    "client",
    "clients",
    "dashboards",
    "demo",
    "deploy",
    "docs",
    "export",
    "playground",
    "protos",
    "scripts",
    "server",
)


def texts() -> dict[str, str]:
    """The text files of the repository by name, without the tests."""
    suffixes = (".py", ".md", ".toml", ".js", ".yaml", ".proto", ".service", "")
    paths = [path for folder in _FOLDERS for path in (REPOSITORY / folder).rglob("*")] + list(REPOSITORY.glob("*"))
    kept = [path for path in paths if path.is_file() and path.suffix in suffixes and "node_modules" not in path.parts]
    return {path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8") for path in kept}


def test_the_distribution_is_installed_under_its_name() -> None:
    assert PROJECT["name"] == distribution.NAME
    assert distribution.version() == metadata.version(distribution.NAME) == PROJECT["version"]
    commands = metadata.distribution(distribution.NAME).entry_points.select(group="console_scripts")
    assert [command.name for command in commands] == ["img2img"]


def test_every_install_command_names_our_distribution_and_extras_that_exist() -> None:
    """`img2img` on PyPI is another project."""
    extras = PROJECT["optional-dependencies"].keys()
    found = 0
    for name, text in texts().items():
        for match in _REQUIREMENT.finditer(text):
            found += 1
            assert match["name"] in (".", distribution.NAME), f"{name}: {match[0]}"
            assert set(match["extras"].split(",")) <= extras, f"{name}: {match[0]}"
        assert set(_BARE.findall(text)) <= {distribution.NAME}, name
    assert found > 20


@pytest.mark.parametrize("command", ["pip install 'img2img[ray]'", 'pip install "img2img[ray]"', "img2img[server,ray]"])
def test_wrong_name_in_an_install_command_is_detected(command: str) -> None:
    assert [match["name"] for match in _REQUIREMENT.finditer(f"x: {command}")] == ["img2img"]


def test_code_builds_install_commands_in_one_place() -> None:
    literal = re.compile(r"pip install ['\"]*(img2img|\{)")
    users = {name for name, text in texts().items() if name.endswith(".py") and literal.search(text)}
    assert users == {"server/img2img_server/support/distribution.py"}
    assert distribution.install_hint("server", "ray") == "pip install 'img2img-server[server,ray]'"

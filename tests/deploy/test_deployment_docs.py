"""docs/deployment.md names only existing flags, files, variables and numbers."""

import argparse
import importlib
import re

from conftest import REPOSITORY
from img2img_cli.__main__ import COMMANDS
from img2img_server.__main__ import CLIENT_VARIABLES, CONFIG_VARIABLE, VARIABLES
from img2img_server.config import ServerConfig
from img2img_server.settings.setting import settings_of
from img2img_server.telemetry.metrics import WORK
from kustomizing import KUBERNETES, build
from serving_settings import CLOSING, config_of

_TEXT = (REPOSITORY / "docs" / "deployment.md").read_text(encoding="utf-8")
_DEPLOY = REPOSITORY / "deploy"


def words(command: str) -> set[str]:
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[command][0]).configure(parser)
    return set(parser._option_string_actions) | {flag for one in subparsers(parser) for flag in one._option_string_actions}


def subparsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    actions = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    return [choice for action in actions for choice in action.choices.values()]


def test_documented_flags_exist() -> None:
    text = _TEXT.replace("\\\n", " ").replace("serve --config\ndeploy", "serve --config deploy")
    named = re.findall(r"img2img (\w+)((?: [\w./=-]+)*)", text)
    seen = [(command, flag) for command, rest in named if command in COMMANDS for flag in re.findall(r"--[a-z-]+", rest)]
    assert len(seen) > 5
    assert all(flag in words(command) for command, flag in seen), seen
    for flag in ("--allow-downloads", "--max-waiting-seconds", "--timeout"):
        assert flag in _TEXT
        assert flag in words("serve") | words("health")


def test_documented_variables_are_settings_or_client_variables() -> None:
    known = {VARIABLES + one.name.upper() for one in settings_of(ServerConfig)} | {CONFIG_VARIABLE, *CLIENT_VARIABLES}
    assert set(re.findall(r"\bIMG2IMG_[A-Z_]*[A-Z]", _TEXT)) <= known


def test_documented_files_and_links_exist() -> None:
    named = set(re.findall(r"`?\b((?:deploy|scripts|docs)/[\w./-]+\w)", _TEXT))
    named |= {f"deploy/kubernetes/{path}" for path in re.findall(r"`((?:base|components|overlays)/[\w./-]+\w)`", _TEXT)}
    assert len(named) > 10
    for name in named:
        assert (REPOSITORY / name).exists(), name
    for file, heading in re.findall(r"\]\((\w+\.md)?(?:#([\w-]+))?\)", _TEXT):
        text = (REPOSITORY / "docs" / file).read_text(encoding="utf-8") if file else _TEXT
        headings = [
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        ]
        assert not heading or heading in headings, f"{file}#{heading}"


def test_documented_numbers_match_the_files() -> None:
    container = config_of([], {}, _DEPLOY / "server.toml")
    assert f"`grace` ({container.grace:g} s in that file)" in _TEXT
    (stop,) = re.findall(r"--stop-timeout (\d+)", _TEXT)
    assert int(stop) > container.grace + CLOSING
    machine = config_of([], {}, _DEPLOY / "systemd" / "server.toml")
    assert f"longer than `grace` ({machine.grace:g} s)" in _TEXT
    (deployment,) = (one for one in build(KUBERNETES / "overlays" / "cpu") if one["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    assert f"`terminationGracePeriodSeconds` ({pod['terminationGracePeriodSeconds']})" in _TEXT
    for probe in ("readiness", "liveness"):
        about = pod["containers"][0][f"{probe}Probe"]
        assert f"| {probe} | after {about['periodSeconds'] * about['failureThreshold']} s |" in _TEXT
    uv = (REPOSITORY / "scripts" / "uv-version").read_text(encoding="utf-8").strip()
    assert f"uv=={uv}" in _TEXT
    assert f"`{WORK.name}`" in _TEXT


def test_documented_commands_are_in_a_working_order() -> None:
    commands = [line for block in re.findall(r"^```\n(.*?)^```$", _TEXT, re.MULTILINE | re.DOTALL) for line in block.splitlines()]
    (ready,) = (
        place for place, line in enumerate(commands) if line.startswith("kubectl -n img2img wait ") and "load-models" in line
    )
    (copied,) = (place for place, line in enumerate(commands) if line.startswith("kubectl -n img2img cp "))
    assert ready < copied, "nothing is copied into a pod that is not there yet"
    # Debian's own Python refuses to be installed into.
    assert not [line for line in commands if re.match(r"(uv )?pip ", line)]

"""The unit for systemd starts our command with its settings, lets it drain, and knows its exit statuses."""

import shlex
from collections import defaultdict
from pathlib import Path

from conftest import REPOSITORY
from img2img_server.__main__ import VARIABLES
from img2img_server.api import lifecycle
from img2img_server.config import ServerConfig
from img2img_server.settings.setting import settings_of
from img2img_server.settings.sources import from_text
from serving_settings import CLOSING, config_of

_FOLDER = REPOSITORY / "deploy" / "systemd"


def unit() -> dict[str, list[str]]:
    """The unit's values by directive; directives may be repeated."""
    said: dict[str, list[str]] = defaultdict(list)
    for line in (_FOLDER / "img2img.service").read_text(encoding="utf-8").splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            said[name].append(value)
    return said


def config() -> ServerConfig:
    """The configuration of the server by the unit and its installed file."""
    words = shlex.split(unit()["ExecStart"][0])
    assert words[:2] == ["/opt/img2img/bin/img2img", "serve"]
    return config_of(words[2:], {}, _FOLDER / "server.toml")


def test_unit_starts_the_server_with_its_config_file() -> None:
    words = shlex.split(unit()["ExecStart"][0])
    assert words[2:] == ["--config", "/etc/img2img/server.toml"]
    assert unit()["ConditionPathExists"] == [words[3], words[0]]
    assert unit()["EnvironmentFile"] == ["-/etc/img2img/environment"]
    assert config().host == "127.0.0.1", "nobody is served in plain text, as it comes"


def test_variables_of_the_example_are_settings() -> None:
    lines = (_FOLDER / "environment").read_text(encoding="utf-8").splitlines()
    examples = dict(line.removeprefix("# ").split("=", 1) for line in lines if line.startswith(f"# {VARIABLES}"))
    assert examples
    assert examples.keys() <= {VARIABLES + one.name.upper() for one in settings_of(ServerConfig)}
    config_of(["--models", "m"], examples)


def test_written_paths_are_directories_of_the_unit() -> None:
    states = {f"/var/lib/{name}" for name in unit()["StateDirectory"][0].split()}
    assert {str(config().models), str(config().assets.url)} <= states
    environment = dict(part.split("=", 1) for part in unit()["Environment"][0].split())
    assert environment["XDG_CACHE_HOME"] == f"/var/cache/{unit()['CacheDirectory'][0]}"
    assert unit()["ProtectSystem"] == ["strict"]


def test_stop_timeout_leaves_time_to_drain() -> None:
    assert unit()["KillSignal"] == ["SIGTERM"]
    (grace,) = (one for one in settings_of(ServerConfig) if one.name == "grace")
    assert from_text(grace, unit()["TimeoutStopSec"][0]) > config().grace + CLOSING
    assert unit()["KillMode"] == ["mixed"], "the server ends its own processes"


def test_unit_restarts_on_failure_except_for_invalid_settings() -> None:
    never = {int(status) for status in unit()["RestartPreventExitStatus"][0].split()}
    good = {int(status) for status in unit()["SuccessExitStatus"][0].split()}
    assert unit()["Restart"] == ["on-failure"]
    assert never == {2}
    assert lifecycle.STUCK not in never | good
    assert 1 not in never | good


def test_unit_has_access_only_to_nvidia_devices() -> None:
    assert unit()["DevicePolicy"] == ["closed"]
    assert unit()["DeviceAllow"] == ["char-nvidia* rw"]
    assert unit()["CapabilityBoundingSet"] == [""]
    assert unit()["User"] == ["img2img"]


def test_systemd_folder_has_exactly_the_expected_files() -> None:
    assert {path.name for path in _FOLDER.iterdir()} == {"img2img.service", "server.toml", "environment"}
    assert all(Path(path).is_absolute() for path in (*unit()["ConditionPathExists"], unit()["WorkingDirectory"][0]))

"""Settings: from a flag, a variable or a file, in that order; printed settings can be read again."""

import argparse
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from img2img_server.config import ServerConfig
from img2img_server.runtime.execution import Bucket
from img2img_server.settings.setting import FieldPath, Setting, build, section, setting, settings_of, value_of
from img2img_server.settings.sources import (
    DEFAULT,
    FLAG,
    Configured,
    Environment,
    SettingError,
    as_toml,
    declare,
    from_text,
    resolve,
    to_toml,
)
from img2img_server.settings.sources import given as flags_given

ALL = settings_of(ServerConfig)
SOURCES = ("file", "variable", "flag")  # the later counts more


@dataclass(frozen=True, slots=True)
class Oven:
    """A section with an example of each type."""

    heat: float = setting(1.0, "how hot", least=0, most=250, name="oven_heat")
    bake: float = setting(60.0, "how long", metavar="SECONDS")
    fan: bool = setting(True, "blow")
    mode: Literal["top", "bottom"] = setting("top", "where from")
    trays: tuple[str, ...] = setting((), "what in")
    room: int | None = setting(None, "how large", metavar="BYTES", least=1)
    recipes: Path | None = setting(None, "where they are")


@dataclass(frozen=True, slots=True)
class Kitchen:
    """A configuration that no server has."""

    cook: str = setting("", "who", required=True)
    hands: int = setting(2, "with what")
    shelf: str | None = setting(None, "place or URL", is_path=lambda text: "://" not in text)
    oven: Oven = section(Oven, "the oven", prefix="my_")

    def __post_init__(self) -> None:
        if self.hands == 13:
            raise ValueError("hands: thirteen is too many")


def _resolve(
    words: list[str], variables: Mapping[str, str], file: Path | None = None, kind: type[Any] = Kitchen
) -> Configured[Any]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    declare(parser, settings_of(kind))
    flags = flags_given(settings_of(kind), parser.parse_args(words))
    return resolve(kind, flags, Environment(variables, "K_", ("K_OTHER",)), file)


def _file(folder: Path, text: str) -> Path:
    file = folder / "kitchen.toml"
    file.write_text(text, encoding="utf-8")
    return file


# Any text that TOML can hold, except texts that would be split, expanded as a home folder, or stripped as one of several.
_TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0,~"), min_size=1).filter(
    lambda text: text == text.strip()
)
_FILES = st.text(string.ascii_letters + ' ."\\é😀#=', min_size=1).map(Path)  # fmt: skip
_BUCKETS = st.lists(st.builds(Bucket, *[st.integers(1, 9999)] * 3), max_size=3).map(tuple)


def _values(one: Setting) -> st.SearchStrategy[Any]:
    """Any value that is good for a setting of the server's."""
    least, most = one.about.least, one.about.most
    if one.choices:
        return st.sampled_from(one.choices)
    if one.name == "buckets":
        return _BUCKETS
    if get_origin(one.kind) is tuple:
        return st.lists(_TEXTS, max_size=3).map(tuple)
    if one.kind is float:
        return st.floats(least or 0, 1e9)
    by_kind: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(int(least or 0), int(most or 2**62)),
        Path: _FILES,
        str: _TEXTS,
    }
    return by_kind[one.kind]


_SECTIONS = ("tls", "residency", "ray")
"""Sections whose settings depend on each other."""


@st.composite
def _said(draw: st.DrawFn) -> dict[str, dict[FieldPath, Any]]:
    """The values in each source: a few settings each, and all of some sections."""
    said = {}
    for source in SOURCES:
        some = draw(st.lists(st.sampled_from(ALL), unique_by=lambda one: one.path))
        whole = {one.path[0] for one in some} & set(_SECTIONS)
        said[source] = {one.path: draw(_values(one)) for one in ALL if one in some or one.path[0] in whole}
    return said


def _text(one: Setting, value: Any) -> str:
    """The value as written in a shell."""
    if one.about.parse is not None:
        return one.about.write(value)
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _words(one: Setting, value: Any) -> str:
    if isinstance(value, bool):
        return one.flag if value else one.flag.replace("--", "--no-", 1)
    return f"{one.flag}={_text(one, value)}"


def _toml(said: Mapping[FieldPath, Any]) -> str:
    """A file with these values. The code under test writes its strings; the TOML parser is a library's."""
    known = {one.path: one for one in ALL}
    lines = []
    for path, value in sorted(said.items(), key=lambda item: len(item[0])):
        relative = isinstance(value, Path)  # to_toml would make it absolute
        lines.append(f"{'.'.join(path)} = {to_toml(known[('host',)], str(value)) if relative else to_toml(known[path], value)}")
    return "\n".join(lines)


@given(_said(), _FILES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
def test_first_source_with_a_value_wins(tmp_path: Path, said: dict[str, dict[FieldPath, Any]], models: Path) -> None:
    """For every setting and combination of sources, the value is the flag's, else the variable's, else the file's, else the
    default; read again, the printed value is the same."""
    said["flag"].setdefault(("models",), models)
    said["variable"] = {path: value for path, value in said["variable"].items() if value != ()}  # empty ones are refused
    expected: dict[FieldPath, Any] = {}
    origins: dict[FieldPath, str] = {}
    for source in SOURCES:
        for one in ALL:
            if one.path in said[source]:
                value = said[source][one.path]
                expected[one.path] = tmp_path / value if source == "file" and isinstance(value, Path) else value
                origins[one.path] = {"file": "kitchen.toml", "variable": f"K_{one.name.upper()}", "flag": FLAG}[source]
    words = [_words(one, said["flag"][one.path]) for one in ALL if one.path in said["flag"]]
    variables = {f"K_{one.name.upper()}": _text(one, said["variable"][one.path]) for one in ALL if one.path in said["variable"]}
    file = _file(tmp_path, _toml(said["file"]))
    try:
        build(ServerConfig, expected)
    except ValueError as error:
        with pytest.raises(SettingError, match=re.escape(str(error))):
            _resolve(words, variables, file, ServerConfig)
        return

    found = _resolve(words, variables, file, ServerConfig)
    for one in ALL:
        assert _same(one, value_of(found.config, one), expected.get(one.path, one.default))
        assert found.origins[one.path] == origins.get(one.path, DEFAULT)
    again = _resolve([], {}, _file(tmp_path, as_toml(found)), ServerConfig)
    for one in ALL:
        before = value_of(found.config, one)
        assert _same(one, value_of(again.config, one), before.absolute() if isinstance(before, Path) else before)


def _same(one: Setting, value: Any, expected: Any) -> bool:
    """Whether it is this value; a folder that is given as text may have been made absolute."""
    if expected is not None and one.about.is_path is not None and one.about.is_path(expected):
        return Path(value).name == Path(expected).name
    return bool(value == expected)


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_setting_names_are_unique(one: Setting) -> None:
    assert [other.name for other in ALL].count(one.name) == 1
    assert one.about.help
    if not one.about.required and one.default is not None:
        one.check(one.default)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("room", "16MiB", 16 * 2**20), ("room", "1.5GiB", 3 * 2**29), ("room", "500MB", 500_000_000), ("room", "2 kB", 2000),
        ("room", "123", 123), ("room", "1tib", 2**40), ("room", "7B", 7),
        ("bake", "90s", 90.0), ("bake", "15m", 900.0), ("bake", "24h", 86400.0), ("bake", "1.5", 1.5), ("bake", "250ms", 0.25),
        ("bake", "2d", 172800.0),
        ("fan", "on", True), ("fan", "OFF", False), ("fan", "1", True), ("fan", "no", False), ("fan", "yes", True),
        ("trays", "a, b", ("a", "b")),
    ],
)  # fmt: skip
def test_values_are_parsed_from_text(tmp_path: Path, name: str, text: str, value: object) -> None:
    (one,) = [one for one in settings_of(Oven) if one.name == name]
    assert from_text(one, text) == value
    found = _resolve(["--cook", "me"], {f"K_MY_{name.upper()}": text})
    assert getattr(found.config.oven, name) == value
    if name in ("room", "bake"):
        written = _file(tmp_path, f'cook = "me"\noven.{name} = "{text}"')
        assert getattr(_resolve([], {}, written).config.oven, name) == value


@pytest.mark.parametrize(
    ("variables", "toml", "problem"),
    [
        ({"K_HANDS": "x"}, "", "K_HANDS is 'x', expected an integer"),
        ({"K_COOK": "\udcff"}, "", r"K_COOK is '\udcff', which is not valid UTF-8"),
        ({"K_MY_RECIPES": "~nobody-here/x"}, "", "K_MY_RECIPES is '~nobody-here/x', but this home directory does not exist"),
        ({"K_MY_OVEN_HEAT": "nan"}, "", "K_MY_OVEN_HEAT is nan, the maximum is 9.22337e+09"),
        ({"K_MY_OVEN_HEAT": "251"}, "", "K_MY_OVEN_HEAT is 251.0, the maximum is 250"),
        ({"K_MY_BAKE": "9" * 20 + "s"}, "", f"K_MY_BAKE is {'9' * 20}, the maximum is 9.22337e+09"),
        ({"K_MY_ROOM": "8G"}, "", "K_MY_ROOM is '8G', expected a number of bytes, or a size such as 500MB or 1.5GiB"),
        ({"K_MY_ROOM": "0"}, "", "K_MY_ROOM is 0, the minimum is 1"),
        ({"K_MY_BAKE": "5w"}, "", "K_MY_BAKE is '5w', expected a number of seconds, or a time such as 90s, 15m or 24h"),
        ({"K_MY_FAN": "maybe"}, "", "K_MY_FAN is 'maybe', expected true or false"),
        ({"K_MY_MODE": "side"}, "", "K_MY_MODE is 'side', expected one of top, bottom"),
        ({"K_MY_TRAYS": "a,,b"}, "", "K_MY_TRAYS is empty"),
        ({"K_MY_TRAYS": " "}, "", "K_MY_TRAYS is empty"),
        ({"K_HAND": "2"}, "", "unknown setting K_HAND; did you mean K_HANDS?"),
        ({"K_ZZZZZ": "2"}, "", "unknown setting K_ZZZZZ"),
        ({"K_OTHERS": "2"}, "", "unknown setting K_OTHERS; did you mean K_OTHER?"),
        ({}, "hands = 13", "hands: thirteen is too many"),
        ({}, "hands = '2'", 'kitchen.toml: hands is "2", expected an integer'),
        ({}, "hands = true", "kitchen.toml: hands is true, expected an integer"),
        ({}, "hands = 1.0", "kitchen.toml: hands is 1.0, expected an integer"),
        ({}, "cook = 1", "kitchen.toml: cook is 1, expected a string in quotes"),
        ({}, "cook = 2020-01-01", 'kitchen.toml: cook is "2020-01-01", expected a string in quotes'),
        ({}, "oven.fan = 'yes'", 'kitchen.toml: oven.fan is "yes", expected true or false'),
        ({}, "oven.fan = 1", "kitchen.toml: oven.fan is 1, expected true or false"),
        ({}, "oven.bake = false", "kitchen.toml: oven.bake is false, expected a number"),
        ({}, f"oven.bake = 1{'0' * 400}", f"kitchen.toml: oven.bake is 1{'0' * 400}, the maximum is 9.22337e+09"),
        ({}, "oven.trays = [1]", "kitchen.toml: oven.trays contains an item that is not a string"),
        ({}, "oven.trays = 1", "kitchen.toml: oven.trays is 1, expected an array of strings"),
        ({}, "oven.oven_heat = 1", "kitchen.toml: unknown key 'oven.oven_heat'; did you mean 'oven.heat'?"),
        ({}, "fan = true", "kitchen.toml: unknown key 'fan'; did you mean 'oven.fan'?"),
        ({}, "oven.mod = 1", "kitchen.toml: unknown key 'oven.mod'; did you mean 'oven.mode'?"),
        ({}, "oven.tray = 1", "kitchen.toml: unknown key 'oven.tray'; did you mean 'oven.trays'?"),
        ({}, "handz = 1", "kitchen.toml: unknown key 'handz'; did you mean 'hands'?"),
        ({}, "oven = 1", "kitchen.toml: oven must be a table, [oven]"),
        ({}, "[ovn]\nfan = true", "kitchen.toml: unknown table [ovn]; did you mean [oven]?"),
        ({}, "[hands]\nleft = 1", "kitchen.toml: hands is {\"left\": 1}, expected an integer"),
        ({}, "[oven.door]\nopen = true", "kitchen.toml: unknown table [oven.door]; did you mean [oven]?"),
        ({}, "hands =", "kitchen.toml: Invalid value (at end of document)"),
        ({}, "", "cook is not set: give --cook TEXT, the variable K_COOK or the key 'cook' in a file"),
    ],
)  # fmt: skip
def test_setting_errors_name_their_source(tmp_path: Path, variables: dict[str, str], toml: str, problem: str) -> None:
    with pytest.raises(SettingError) as caught:
        _resolve(["--cook", "me"] if "cook is not set" not in problem else [], variables, _file(tmp_path, toml))
    assert str(caught.value).replace(f"{tmp_path}/", "") == problem


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--hands=x", "--hands is 'x', expected an integer"),
        ("--my-oven-heat=-1", "--my-oven-heat is -1.0, the minimum is 0"),
    ],
)
def test_wrong_flags_are_named(words: str, problem: str) -> None:
    with pytest.raises(argparse.ArgumentError) as caught:
        _resolve([words], {})
    assert str(caught.value) == problem


def test_binary_config_file_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "kitchen.toml"
    file.write_bytes(b"cook = '\xff'")
    with pytest.raises(SettingError, match=r"kitchen\.toml: .*utf-8"):
        _resolve([], {}, file)


def test_relative_paths_in_a_file_are_relative_to_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    said = 'cook = "me"\nshelf = "pots"\n[oven]\nrecipes = "a/b"'
    found = _resolve([], {}, _file(tmp_path, said)).config
    assert (found.shelf, found.oven.recipes) == (f"{tmp_path}/pots", tmp_path / "a/b")
    said = 'cook = "me"\nshelf = "s3://pots/x"\n[oven]\nrecipes = "~/b"'
    found = _resolve([], {}, _file(tmp_path, said)).config
    assert (found.shelf, found.oven.recipes) == ("s3://pots/x", Path("/home/me/b"))
    found = _resolve(["--cook=me", "--my-recipes=a/b"], {"K_SHELF": "pots"}).config
    assert (found.shelf, found.oven.recipes) == ("pots", Path("a/b"))


def test_printed_config_round_trips_any_character(tmp_path: Path) -> None:
    odd = "".join(map(chr, (*range(1, 0x100), 0x2028, 0x1F600)))
    found = _resolve([], {"K_COOK": odd})
    assert _resolve([], {}, _file(tmp_path, as_toml(found))).config.cook == odd


def test_help_has_every_flag_with_its_default() -> None:
    parser = argparse.ArgumentParser()
    declare(parser, ALL)
    text = " ".join(parser.format_help().split())
    for one in ALL:
        assert one.flag in text
    for default in ("(default: 50051)", "(default: 256 MiB)", "(default: off)", "(default: default)", "(default: 30)"):
        assert default in text

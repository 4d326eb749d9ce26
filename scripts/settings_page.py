"""The reference of the server's settings, docs/settings.md, made of the configuration itself. `--check` fails where the page says
something else."""

import argparse
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import get_origin

from img2img_server.__main__ import CONFIG_VARIABLE, VARIABLES
from img2img_server.config import ServerConfig
from img2img_server.settings.setting import Setting, settings_of
from img2img_server.settings.values import for_people

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "settings.md"

_HEAD = f"""\
# Settings of img2img serve

<!-- Made by scripts/settings from server/img2img_server/config.py: edit that. -->

Reference of all settings. Each has a flag, an environment variable and a key in the TOML file of `--config` or
`{CONFIG_VARIABLE}`; a flag overrides a variable, and a variable overrides the file. Bytes can be written as `500MB` or `1.5GiB`,
seconds as `250ms`, `90s`, `15m` or `24h`; bounds are inclusive. [operations.md](operations.md#settings) has an example and
explains what the settings do; `img2img serve --print-config` shows the values in use and their sources.
"""
_KINDS = {int: "whole number", float: "number", bool: "switch", str: "text", Path: "path"}
_UNITS = {"BYTES": "bytes", "SECONDS": "seconds"}


def page() -> str:
    """The whole page."""
    parts = [_HEAD]
    for group, settings in groupby(settings_of(ServerConfig), key=lambda one: (one.group, one.path[:-1])):
        heading, table = group
        where = f"Table `[{'.'.join(table)}]` in a file." if table else "At the top of a file, before its tables."
        title = heading[:1].upper() + heading[1:] if heading else "The server"
        parts += [f"\n## {title}\n\n{where}\n\n", "".join(f"{line}\n" for line in _table(list(settings)))]
    return "".join(parts)


def _table(settings: list[Setting]) -> Iterator[str]:
    yield "| flag | variable | key | value | default | meaning |"
    yield "|---|---|---|---|---|---|"
    for one in settings:
        flag = f"`{one.flag}`, `{one.flag.replace('--', '--no-', 1)}`" if one.kind is bool else f"`{one.flag}`"
        cells = (flag, f"`{VARIABLES}{one.name.upper()}`", f"`{one.path[-1]}`", _value(one), _default(one), _text(one.about.help))
        yield f"| {' | '.join(cells)} |"


def _value(one: Setting) -> str:
    """What it can be: words of a few, or a kind of value with its unit and its bounds."""
    if one.choices:
        return ", ".join(f"`{word}`" for word in one.choices)
    if get_origin(one.kind) is tuple or one.about.parse is not None:
        return f"`{one.about.metavar}`" if one.about.metavar else "list"
    kind = _UNITS.get(one.about.metavar, _KINDS.get(one.kind, "text"))
    bounds = [
        f"{word} {edge:.15g}" for word, edge in (("at least", one.about.least), ("at most", one.about.most)) if edge is not None
    ]
    return ", ".join([kind, *bounds])


def _default(one: Setting) -> str:
    if one.about.required:
        return "(required)"
    return "(not set)" if one.default is None else f"`{for_people(one, one.default)}`"


def _text(help_text: str) -> str:
    return help_text.replace("|", "\\|").replace("<", "&lt;")


def main() -> int:
    """Writes the page, or checks it. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/settings", description="Writes the reference of the server's settings.")
    parser.add_argument("--check", action="store_true", help="fail where the page says something else")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print("docs/settings.md does not say what config.py does: run scripts/settings", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""Generates the Python program that reproduces a transform of the page. It runs without changes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from img2img_client import Control, ImagePrompt

from img2img_playground.settings import Settings

_CLASSES = {"controls": Control.__name__, "image_prompts": ImagePrompt.__name__}
"""Classes of the client, by the options whose values they are."""


@dataclass(frozen=True, slots=True)
class Connection:
    """The connection settings for the copied program. Contains the places of secrets, never the secrets.

    `token_variable` is the environment variable with the token, if there is no token file.
    """

    target: str
    token_file: Path | None = None
    token_variable: str | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None
    allow_insecure_token: bool = False
    timeout: float | None = None


def python_code(
    connection: Connection, source: str, settings: Settings, output: str, files: Mapping[str, object] | None = None
) -> str:
    """A complete program that transforms the file `source` with `settings` and writes `output`, or one file for each seed.

    `files` are options that name files.
    """
    options = {**settings.options(), **(files or {})}
    names = ["Client", *(name for option, name in _CLASSES.items() if option in options)]
    imports = [f"from img2img_client import {', '.join(names)}"]
    arguments = [literal(connection.target)]
    if connection.token_file is not None:
        imports.insert(0, "from pathlib import Path\n")
        arguments.append(f"token=Path({literal(str(connection.token_file))}).read_text().strip()")
    elif connection.token_variable is not None:
        imports.insert(0, "import os\n")
        arguments.append(f"token=os.environ[{literal(connection.token_variable)}]")
    for name in ("ca", "certificate", "key"):
        path = getattr(connection, name)
        if path is not None:
            arguments.append(f"{name}={literal(str(path))}")
    if connection.server_name is not None:
        arguments.append(f"server_name={literal(connection.server_name)}")
    if connection.allow_insecure_token:
        arguments.append("allow_insecure_token=True")
    if connection.timeout is not None:
        arguments.append(f"timeout={connection.timeout!r}")
    lines = [
        *imports,
        "",
        f"with Client({', '.join(arguments)}) as client:",
        "    result = client.transform(",
        f"        {literal(source)},",
        *(f"        {name}={literal(value)}," for name, value in options.items()),
        "    )",
        *_save(output, settings),
    ]
    return "\n".join(lines) + "\n"


def _save(output: str, settings: Settings) -> list[str]:
    if settings.image_count in (None, 1):
        return [f"    result.save({literal(output)})"]
    stem, dot, suffix = output.rpartition(".")
    return [
        "    for image in result.images:",
        f"        image.save({literal(stem + '-')} + str(image.seed) + {literal(dot + suffix)})",
    ]


def literal(value: object) -> str:
    """A value as a Python literal; strings in double quotes, on one line."""
    if isinstance(value, Control):
        numbers = {"scale": value.scale, "start": value.start, "end": value.end}
        named = ", ".join(f"{name}={number!r}" for name, number in numbers.items())
        return f"Control({literal(value.model)}, {literal(value.image)}, {named})"
    if isinstance(value, ImagePrompt):
        return f"ImagePrompt({literal(value.adapter)}, {literal(list(value.images))}, scale={value.scale!r})"
    if isinstance(value, list):
        return f"[{', '.join(literal(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{literal(name)}: {literal(item)}' for name, item in value.items())}}}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)

"""`img2img models`: what a server can run, as a table or as JSON."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from img2img_client.errors import Img2ImgError
from img2img_client.transform_command import complain, describe_error

if TYPE_CHECKING:
    from img2img_client.values import EngineStatus, ModelInfo

PROGRAM = "img2img models"

_EPILOG = """\
examples:
  img2img models
  img2img models --schedulers
  img2img models --server gpu-box:50051 --json
"""

_WIDTH_OF_A_PIPE = 200


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--server", metavar="TARGET", default="localhost:50051", help="default: %(default)s; https://... for TLS")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", default=10.0, help="default: %(default)g")
    parser.add_argument("--schedulers", action="store_true", help="list the schedulers that a request may ask each model for")
    parser.add_argument("--json", action="store_true", help="print every field of every model as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Asks and prints. Returns 0, or 1 where the server did not answer."""
    from img2img_client.client import Client

    try:
        with Client(arguments.server, timeout=arguments.timeout) as client:
            models = client.models()
    except Img2ImgError as error:
        return complain(PROGRAM, describe_error(error, arguments.server))
    if arguments.json:
        print(json.dumps([asdict(model) for model in models]))
    else:
        _print_table(models, arguments.schedulers)
    return 0


def _print_table(models: "tuple[ModelInfo, ...]", schedulers: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    engines = any(model.engines for model in models)
    more = [*(["takeover"] if engines else []), *(["schedulers"] if schedulers else [])]
    table = Table("id", "family", "backend", "engine", "state", "default", *more)
    for model in models:
        cells = [model.id, model.family, model.backend, model.engine, model.state, "yes" if model.is_default else ""]
        if engines:
            cells.append("\n".join(map(_describe_engine, model.engines)))
        if schedulers:
            cells.append("\n".join(model.schedulers))
        table.add_row(*(Text(cell, overflow="fold") for cell in cells))  # Text, since a str would be read as markup.
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE)
    console.print(table)


def _describe_engine(engine: "EngineStatus") -> str:
    done = f" {engine.progress:.0%}" if engine.state in ("building", "checking") else ""
    return f"{engine.name} {engine.state}{done}" + (f": {engine.detail}" if engine.detail else "")

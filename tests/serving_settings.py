"""The configuration that `img2img serve` makes of a file of deploy/, flags and variables."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from img2img_server import __main__ as serve
from img2img_server.config import ServerConfig

CLOSING = 10.0
"""Seconds at the end of a drain, after `grace`, in which the server sends the last answers and closes."""


def config_of(words: Sequence[str], variables: Mapping[str, str], file: Path | None = None) -> ServerConfig:
    """The configuration of `img2img serve` with these words after "serve"; `file` is read where they name one by another path."""
    parser = argparse.ArgumentParser()
    serve.configure(parser)
    arguments = parser.parse_args(list(words))
    if file is not None:
        arguments.config = file
    return serve.configured(arguments, variables).config

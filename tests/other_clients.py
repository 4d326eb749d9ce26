"""What tests of clients in other languages share: where they are, how a program of theirs is run, and who may call."""

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conftest import REPOSITORY

CLIENTS = REPOSITORY / "clients"
PICTURE = REPOSITORY / "demo" / "images" / "noon-lake.png"

PATIENCE = 60.0
"""Seconds after which a test that waits for an event has failed."""

Finished = subprocess.CompletedProcess[str]

Run = Callable[..., Finished]
"""Runs a program of clients/node/examples, or one that is given as text, with arguments. `target` is the server that it calls by
default."""


@dataclass(frozen=True, slots=True)
class Secured:
    """A server with TLS and tokens, and the files of a client that may call it."""

    port: int
    ca: Path
    token: Path


def environment(target: str = "") -> dict[str, str]:
    """This process's variables, but those that tell clients where to go; `target` does, if it is set."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("IMG2IMG_")}
    return own | ({"IMG2IMG_TARGET": target} if target else {})


def blocks(document: Path, language: str) -> list[str]:
    """The blocks of a document that are in a language, in order. ValueError where it has none: then nothing would be tested."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    if not found:
        raise ValueError(f"{document} has no block of {language}")
    return found


def succeeded(result: Finished) -> list[str]:
    """The lines that a program which ended well has printed."""
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def failed(result: Finished) -> list[str]:
    """The lines in which a program told of the call that failed."""
    assert (result.returncode, result.stdout) == (1, "")
    return result.stderr.splitlines()

"""Tokens for tests: files of them, and the metadata of a call with one."""

import os
from pathlib import Path
from typing import Any

from img2img_server.access import tokens
from img2img_server.access.tokens import Token, editing


def bearing(secret: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {secret}"),)


def grant(path: Path, name: str, secret: str | None = None, **what: Any) -> str:
    """Adds a token to a file, and sets the file's time back. Returns the secret."""
    secret = secret or tokens.make_secret()
    with editing(path) as known:
        known[name] = Token(name, tokens.digest(secret), **what)
    rest(path)
    return secret


def rest(path: Path) -> None:
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3600))

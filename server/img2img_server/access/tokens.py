"""The token file: callers and their permissions. Standard library only; `img2img token` writes it, the server reads it.

A token is 256 random bits and is shown once, when it is created. The file stores only its SHA-256. Random tokens need no slow,
salted hash as passwords do: they cannot be guessed, and no two are equal.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any

PREFIX = "img2img_"
"""Prefix of every token, which lets people and secret scanners recognize one."""
MAX_PATTERN = 256

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HEADER = """\
# Tokens of clients, written by `img2img token`, which drops comments. The server reloads this file when it changes.
"""


@dataclass(frozen=True, slots=True)
class Token:
    """A stored token and its permissions.

    `models` are patterns of model ids, None for all. `requests_per_minute` and `concurrency` (calls in progress) are None for no
    limit. An `admin` may load and unload models. The token is invalid from `expires` on, a time with a zone.
    """

    name: str
    sha256: str
    models: tuple[str, ...] | None = None
    requests_per_minute: int | None = None
    concurrency: int | None = None
    admin: bool = False
    expires: datetime | None = None


def make_secret() -> str:
    """A new random token in plain text."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(secret: str) -> str:
    """The SHA-256 of a token, in lower-case hexadecimal."""
    return hashlib.sha256(secret.encode()).hexdigest()


def check_name(name: str) -> str:
    """Returns `name`. Raises ValueError if it is not valid: names appear in logs, metrics and paths."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"'{name}' is not a valid token name: use 1 to 64 of A-Z, a-z, 0-9, _ and -")
    return name


def parse_expiry(value: object) -> datetime:
    """The time given by an ISO 8601 date or time, as text or as parsed by TOML. A date means midnight; the default zone is UTC.
    Raises ValueError."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"'{value}' is not a date such as 2027-01-31 or 2027-01-31T18:00:00Z") from None
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    if isinstance(value, date):
        return datetime.combine(value, time(), UTC)
    raise ValueError(f"expected a date, found {type(value).__name__}")


def parse(data: bytes, where: Path) -> dict[str, Token]:
    """The tokens in a file's contents, by name. `where` is the file's path, for errors. Raises ValueError naming file and key."""
    try:
        content = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid TOML: {error}") from None
    if unknown := set(content) - {"tokens"}:
        raise ValueError(f"{where}: unknown key '{min(unknown)}': a token is a table [tokens.NAME]")
    tables = content.get("tokens", {})
    if not isinstance(tables, dict):
        raise ValueError(f"{where}: tokens: expected tables [tokens.NAME]")
    tokens = {name: _token(name, table, f"{where}: tokens.{name}") for name, table in tables.items()}
    if len({token.sha256 for token in tokens.values()}) < len(tokens):
        raise ValueError(f"{where}: two tokens have the same sha256")
    return tokens


def read(path: Path) -> dict[str, Token]:
    """The tokens of the file `path`, by name. Raises OSError and ValueError."""
    return parse(path.read_bytes(), path)


@contextlib.contextmanager
def editing(path: Path) -> Iterator[dict[str, Token]]:
    """Yields the tokens of a file (empty if it does not exist) for changes, then writes it atomically and privately.

    Holds a lock against other processes. Raises OSError and ValueError.
    """
    path = path.resolve()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        tokens = read(path) if path.exists() else {}
        yield tokens
        _write(path, tokens)
        os.fsync(folder)
    finally:
        os.close(folder)


def _write(path: Path, tokens: Mapping[str, Token]) -> None:
    """Keeps the file's owner and its group's read permission: the server may run as another user than the editor."""
    before = path.stat() if path.exists() else None
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)  # left by a killed process; its mode is not trusted
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 - opens a descriptor, not a path
        if before is not None:
            with contextlib.suppress(PermissionError):
                os.fchown(descriptor, before.st_uid, before.st_gid)
                os.fchmod(descriptor, 0o600 | before.st_mode & stat.S_IRGRP)
        file.write(_HEADER + "".join(map(_table, tokens.values())))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _table(token: Token) -> str:
    lines = [f"\n[tokens.{token.name}]"]
    for item in dataclasses.fields(token)[1:]:
        value = getattr(token, item.name)
        if value is None or value is False:
            continue
        # JSON's text, numbers, true and lists are valid TOML if nothing is escaped as UTF-16.
        text = value.isoformat() if isinstance(value, datetime) else json.dumps(value, ensure_ascii=False)
        lines.append(f"{item.name} = {text}")
    return "\n".join(lines) + "\n"


def _token(name: str, table: object, where: str) -> Token:
    try:
        check_name(name)
        if not isinstance(table, dict):
            raise ValueError("expected a table")
        if unknown := set(table) - set(_READERS):
            raise ValueError(f"unknown key '{min(unknown)}', known are {', '.join(_READERS)}")
        if "sha256" not in table:
            raise ValueError("sha256 is missing")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Token(name, **{key: _value(key, value, f"{where}.{key}") for key, value in table.items()})


def _value(key: str, value: object, where: str) -> Any:
    try:
        return _READERS[key](value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _hash(value: object) -> str:
    if not (isinstance(value, str) and _SHA256.fullmatch(value)):
        raise ValueError("expected 64 lowercase hexadecimal digits")
    return value


def check_patterns(value: object) -> tuple[str, ...]:
    """The value as patterns of model ids. Raises ValueError if it is not a list of them."""
    if not isinstance(value, list | tuple) or not value:
        raise ValueError('expected a list of patterns such as ["sd*"]; leave it out for all models')
    for item in value:
        if not (isinstance(item, str) and 0 < len(item) <= MAX_PATTERN and item.isprintable()):
            raise ValueError(f"{item!r} is not a valid pattern of model ids")
    return tuple(value)


def _count(value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError("expected an integer of at least 1")
    return value


def _flag(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError("expected true or false")
    return value


_READERS: dict[str, Callable[[object], Any]] = {
    "sha256": _hash,
    "models": check_patterns,
    "requests_per_minute": _count,
    "concurrency": _count,
    "admin": _flag,
    "expires": parse_expiry,
}

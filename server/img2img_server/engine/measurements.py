"""Measurements on disk, so that a machine measures once: a folder with one JSON file for each key.

A key is JSON values: everything that a measurement depends on. Its file is found by the key's digest, and contains the key.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from img2img_server.bundle.files import read_json

Key = Mapping[str, Any]

_MOST_BYTES = 2**20
"""Maximum size of a file. The costs of seven batch sizes at two image sizes have 2 KB."""
_MOST_FILES = 512
"""Maximum number of files; the oldest ones are deleted."""


class Measurements:
    """The measurements in the folder `root`, which is made when the first one is kept."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, key: Key) -> dict[str, Any]:
        """The values kept for `key`. Raises FileNotFoundError if there are none, another OSError or ValueError if the file cannot
        be read or is damaged."""
        content = read_json(self._file(key), _MOST_BYTES)
        if not isinstance(content, dict) or content.pop("key", None) != json.loads(json.dumps(key)):
            raise ValueError("the key differs")
        return content

    def keep(self, key: Key, values: Mapping[str, Any]) -> None:
        """Keeps JSON values for `key`, atomically. Raises OSError."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, name = tempfile.mkstemp(dir=self.root, prefix=".", suffix=".part")
        part = Path(name)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"key": key, **values}, file)
            part.replace(self._file(key))
        except OSError:
            part.unlink(missing_ok=True)
            raise
        self._prune()

    def _file(self, key: Key) -> Path:
        return self.root / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.json"

    def _prune(self) -> None:
        files = sorted(self.root.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in files[_MOST_FILES:]:
            with contextlib.suppress(OSError):
                old.unlink()

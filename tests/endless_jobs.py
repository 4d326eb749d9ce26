"""Jobs of a codec process that never end, crash or take all memory. Codec processes import this module by PYTHONPATH."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


class _Small:
    """A job that asks for no more memory and time than a small image has."""

    def advance(self, size: int) -> tuple[int, float]:
        return 0, 0.0


@dataclass(frozen=True)
class Endless(_Small):
    """Runs in C without an end and without checking signals, like a decoder of a decompression bomb. Takes any setting
    of a job."""

    field: str = "image.data"
    settings: Any = None

    def __init__(self, field: str = "image.data", **settings: Any) -> None:
        object.__setattr__(self, "field", field)

    def run(self, data: bytes, reserve: object) -> tuple[None, bytes]:
        sum(iter(int, 1))
        return None, b""


@dataclass(frozen=True)
class Crash(_Small):
    """Ends its process as a fault in a C library does."""

    field: str = "image.data"

    def run(self, data: bytes, reserve: object) -> tuple[None, bytes]:
        os.kill(os.getpid(), signal.SIGSEGV)
        return None, b""


@dataclass(frozen=True)
class Hoard(_Small):
    """Takes more memory than it asked for."""

    field: str = "image.data"

    def run(self, data: bytes, reserve: object) -> tuple[None, bytes]:
        return None, bytes(bytearray(2**30))[:1]


def make_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codec processes that are started from now on can import this module."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

"""What a person asks of the exporter. Standard library only."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Backend = Literal["auto", "onnx", "torch"]


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """One export.

    `source` is a directory in diffusers' layout or a hub repository's id. `backend` "auto" makes graphs where it can and
    falls back to torch, "onnx" fails instead, "torch" makes none. `force` replaces another bundle at `output`.
    """

    source: str
    output: Path
    variant: str | None = None
    revision: str | None = None
    allow_patterns: tuple[str, ...] = ()
    ignore_patterns: tuple[str, ...] = ()
    backend: Backend = "auto"
    force: bool = False

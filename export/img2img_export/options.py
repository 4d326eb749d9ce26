"""What a person asks of the exporter. No library is imported here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from img2img_server.bundle.limits import Precision

Backend = Literal["auto", "onnx", "hybrid", "torch"]


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA to fuse: a safetensors file, and how strongly."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """One export.

    `source` is a directory in diffusers' layout, one that optimum-cli exported, a single safetensors file, or a hub
    repository's id. `config` is where a single file's configurations and tokenizers are taken from (a directory or a
    repository's id; None: the repository that diffusers names for its kind). `reference` is the PyTorch model that an
    optimum-cli directory was made from, to be compared with. `backend` "auto" makes graphs of all that it can and falls back
    to hybrid, then torch; each of the others fails where it cannot be had. `scheduler` names the scheduler that becomes the
    bundle's own (one of the server's names). `force` replaces another bundle at `output`; `allow_unverified` publishes a
    bundle that failed its verification.
    """

    source: str
    output: Path
    variant: str | None = None
    revision: str | None = None
    allow_patterns: tuple[str, ...] = ()
    ignore_patterns: tuple[str, ...] = ()
    config: str | None = None
    reference: str | None = None
    loras: tuple[LoraFile, ...] = ()
    scheduler: str | None = None
    precision: Precision = "fp32"
    backend: Backend = "auto"
    force: bool = False
    allow_unverified: bool = False

"""The options of an export. Imports no libraries."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from img2img_server.bundle.manifest import Precision, WeightFormat

Backend = Literal["auto", "onnx", "hybrid", "torch"]

GROUP_SIZES = (32, 64, 128)
"""Weights that share a scale in weight-only quantization: ONNX Runtime's CPU and CUDA providers have kernels for these."""


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA to fuse: a safetensors file and its scale."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """The options of one export.

    `source` is a directory in diffusers' layout, a directory exported by optimum-cli, a single safetensors file, or the id of a
    hub repository. `config` is the source of a single file's configurations and tokenizers (a directory or a repository id; None:
    the repository that diffusers detects). `reference` is the PyTorch model that an optimum-cli directory was made from, to
    compare with. `backend` "auto" makes graphs of all parts and falls back to hybrid, then torch; the others fail if not
    possible. `scheduler` is the bundle's default scheduler (one of the server's names). `force` replaces another bundle at
    `output`; `allow_unverified` publishes a bundle that failed verification. `lora_graphs` also makes the graphs for
    requests with LoRAs, and `control_graphs` Flux's for requests with ControlNets. `speedups` measures what requests that need
    not be exact can skip. `weight_format` stores the matrices of transformers and text encoders in 8 or 4 bits, in blocks of
    `group_size` weights.
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
    lora_graphs: bool = True
    control_graphs: bool = False
    speedups: bool = False
    weight_format: WeightFormat = ""
    group_size: int = GROUP_SIZES[0]

"""Fuses LoRAs: every adapted weight W becomes W + scale * (alpha / rank) * up @ down.

The sum is computed here, on the stored tensors in fp32: diffusers' fuse_lora loads the whole model, and scales layers wrongly if
they differ in alpha or rank.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from img2img_server.bundle.adapter_files import AdapterProblem
from img2img_server.bundle.manifest import Lora
from img2img_server.runtime.lora.reading import name_among, read_layers

from img2img_export.errors import ExportError
from img2img_export.options import LoraFile
from img2img_export.progress import Progress
from img2img_export.read.checkpoint import Layout
from img2img_export.read.digests import Digests
from img2img_export.read.texts import read_json
from img2img_export.read.weights_file import TensorInfo, read_header, require_safetensors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Layer:
    """The addition of a LoRA to one weight: scale * up @ down, both flattened to matrices."""

    file: Path
    scale: float
    down: "torch.Tensor"
    up: "torch.Tensor"

    def delta(self) -> "torch.Tensor":
        """The addition as an fp32 matrix. For a convolution, rows are output channels."""
        return self.scale * (self.up.float() @ self.down.float())


Additions = dict[str, dict[str, list[_Layer]]]
"""The additions by component and name of the weight."""


def records(loras: Iterable[LoraFile]) -> tuple[Lora, ...]:
    """The manifest entries of LoRAs; imports nothing heavy. Raises ExportError if one is not a safetensors file."""
    loras = tuple(loras)
    for lora in loras:
        require_safetensors(lora.path)
    digests = Digests()
    made = tuple(Lora(lora.path.name, lora.scale, digests.sha256(lora.path)) for lora in loras)
    digests.save()
    return made


def fuse(directory: Path, layout: Layout, loras: Iterable[LoraFile], progress: Progress) -> tuple[Lora, ...]:
    """Fuses `loras` into the checkpoint in `directory`: links to changed weights become files of the same name and precision.

    Raises ExportError, with `directory` unchanged, if a file is not a LoRA or the model lacks one of its layers. Also raises
    ExportError, while weights are written, if a sum overflows the weight's type.
    """
    loras = tuple(loras)
    made = records(loras)
    additions: Additions = {}
    for lora in loras:
        _add(lora, directory, layout, additions)
    files = {name: _check(directory / name, name, weights) for name, weights in additions.items()}
    for name, (paths, weights) in files.items():
        progress.stage(f"fusing {', '.join(lora.path.name for lora in loras)} into {name}")
        for file in paths:
            _rewrite(file, weights)
    return made


def _add(lora: LoraFile, directory: Path, layout: Layout, additions: Additions) -> None:
    """Reads a LoRA and adds its layers to `additions`."""
    config = read_json(directory / "unet" / "config.json") if "unet" in layout.components else None
    try:
        layers = read_layers(lora.path, layout.pipeline_class, tuple(layout.components), config)
    except AdapterProblem as problem:
        raise ExportError(f"{lora.path} {problem}") from problem
    for layer in layers:
        scale = lora.scale * layer.factor
        if not math.isfinite(scale):
            raise ExportError(f"{lora.path}: the scale {lora.scale:g} is too large")
        added = _Layer(lora.path, scale, layer.down.flatten(1), layer.up)
        additions.setdefault(layer.component, {}).setdefault(f"{layer.module}.weight", []).append(added)


def _check(folder: Path, component: str, weights: Mapping[str, list[_Layer]]) -> tuple[list[Path], dict[str, list[_Layer]]]:
    """The files of a component that change, and the additions by the weights' names in them. Raises ExportError if a weight is
    missing or has a different shape."""
    files = {file: read_header(file)[0] for file in sorted(folder.glob("*.safetensors"))}
    stored: dict[str, TensorInfo] = {name: info for tensors in files.values() for name, info in tensors.items()}
    named: dict[str, list[_Layer]] = {}
    for name, layers in weights.items():
        named.setdefault(name_among(stored, name), []).extend(layers)
    for name, layers in named.items():
        for layer in layers:
            if name not in stored:
                raise ExportError(f"{layer.file} does not fit {component}: it adapts {name}, which the model does not have")
            shape = stored[name].shape
            wanted, found = (shape[0], math.prod(shape[1:])), (len(layer.up), layer.down.shape[1])
            if wanted != found or layer.up.shape[1] != len(layer.down):
                raise ExportError(
                    f"{layer.file} does not fit {component}: {name} has shape {wanted} in the model and {found} in the LoRA"
                )
    return [file for file, tensors in files.items() if not named.keys().isdisjoint(tensors)], named


def _rewrite(file: Path, weights: Mapping[str, list[_Layer]]) -> None:
    """Rewrites a safetensors file, replacing a link, with the LoRAs' layers added."""
    import safetensors.torch

    _, notes = read_header(file)
    tensors = safetensors.torch.load_file(file)
    for name in weights.keys() & tensors.keys():
        stored = tensors[name]
        total = stored.float()
        for layer in weights[name]:
            total = total + layer.delta().reshape(stored.shape)
        tensors[name] = total.to(stored.dtype)
        if stored.isfinite().all() and not tensors[name].isfinite().all():
            names = ", ".join(str(layer.file) for layer in weights[name])
            raise ExportError(
                f"{names}: what it adds to {name} is too large for {stored.dtype}; use a smaller scale, or download it again"
            )
    temporary = file.with_suffix(".part")
    safetensors.torch.save_file(tensors, temporary, metadata=notes)
    temporary.replace(file)

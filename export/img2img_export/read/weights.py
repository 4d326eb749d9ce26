"""Sizes of the parts of a checkpoint from file headers: reads no weights, imports nothing heavy.

A safetensors file begins with 8 bytes of length and a JSON object with the names, types and shapes of its tensors.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from img2img_server.bundle.manifest import WEIGHT_BYTES

from img2img_export.read.checkpoint import DENOISERS
from img2img_export.read.source import Checkpoint
from img2img_export.read.weights_file import is_safetensors, read_header


class Tensor(Protocol):
    """A tensor in a header. The hub's parser has its own class with these attributes."""

    @property
    def dtype(self) -> str:
        """The type, such as F32 or BF16."""

    @property
    def shape(self) -> Sequence[int]:
        """The size of each axis."""


Header = Mapping[str, Tensor]
"""A safetensors file's tensors by name."""

_PRECISIONS = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}

_PREFIXES = (
    ("model.diffusion_model.", DENOISERS),
    ("first_stage_model.", ("vae",)),
    ("vae.", ("vae",)),
    ("conditioner.embedders.0.", ("text_encoder", "text_encoder_2")),
    ("conditioner.embedders.1.", ("text_encoder_2",)),
    ("cond_stage_model.", ("text_encoder",)),
    ("text_encoders.clip_l.", ("text_encoder",)),
    ("text_encoders.clip_g.", ("text_encoder_2",)),
    ("text_encoders.t5xxl.", ("text_encoder_3", "text_encoder_2")),
)
"""Prefixes of a single file's tensors, and their component: the first one that the model has."""
_BARE_DENOISER = ("double_blocks.", "single_blocks.", "joint_blocks.", "input_blocks.")
"""Prefixes in a file that contains only a denoiser."""


_VISION = frozenset({"visual", "vision_tower", "multi_modal_projector"})
"""Parts of the names of tensors of a vision tower."""
_LAYER, _LAST_NORM = re.compile(r"(?:.*\.)?layers\.(\d+)\."), re.compile(r"(?:(?!.*layers\.\d).*\.)?norm\.weight")
"""Names of tensors in a language model's layer, and after the last."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a part: parameters, how many of them are in matrices and convolutions, the most frequent precision, and
    bytes."""

    parameters: int = 0
    products: int = 0
    stored: str = ""
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Contents:
    """A checkpoint's safetensors headers and the bytes of its ONNX files, by path."""

    headers: Mapping[str, Header] = field(default_factory=dict)
    graphs: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InGraph:
    """The part of a language model in its graph: the layers up to the hidden state `last` (-1: up to the last state), and the
    vision tower if it `sees` images."""

    last: int
    sees: bool

    def has(self, tensor: str, layers: int) -> bool:
        """Whether it has a tensor of a model with so many `layers`."""
        if tensor.partition(".")[0] == "lm_head":
            return False
        if not _VISION.isdisjoint(tensor.split(".")):
            return self.sees
        last = self.last if self.last >= 0 else layers + 1 + self.last
        return last >= layers if _LAST_NORM.fullmatch(tensor) else _layer(tensor) < last


def _layer(tensor: str) -> int:
    """The index of a language model's layer that has a tensor; -1 for those before the first."""
    found = _LAYER.match(tensor) if _VISION.isdisjoint(tensor.split(".")) else None
    return int(found[1]) if found is not None else -1


def _names(contents: Contents, components: Sequence[str]) -> dict[str, list[str]]:
    """The names of the tensors in the folders of components."""
    found: dict[str, list[str]] = {name: [] for name in components}
    for path, header in contents.headers.items():
        found.get(path.partition("/")[0], []).extend(header)
    return found


def read_contents(checkpoint: Checkpoint) -> Contents:
    """Reads the headers of local files. Raises ExportError if one is damaged."""
    paths = {name: checkpoint.directory / name for name in checkpoint.files if is_safetensors(name)}
    if checkpoint.weights is not None:
        paths[checkpoint.weights.name] = checkpoint.weights
    graphs = {name: (checkpoint.directory / name).stat().st_size for name in checkpoint.files if is_graph(name)}
    return Contents({name: read_header(path)[0] for name, path in paths.items()}, graphs)


def is_graph(name: str) -> bool:
    """Whether a file is an ONNX graph or its external weights."""
    return ".onnx" in Path(name).name


def weigh(
    contents: Contents, components: Sequence[str], alone: bool = False, in_graph: Mapping[str, InGraph] | None = None
) -> dict[str, Weights]:
    """The weights of each component: the files in its folder, or a single file's tensors by name. With `alone`, all weights
    belong to the only component. A component in `in_graph` has only the weights of its graph."""
    found: dict[str, list[Tensor]] = {}
    layers = {name: 1 + max(map(_layer, names), default=-1) for name, names in _names(contents, components).items()}
    for path, header in contents.headers.items():
        folder = path.partition("/")[0]
        for name, tensor in header.items():
            owner = components[0] if alone else _component_of(name, components)
            component = folder if folder in components else owner
            graph = (in_graph or {}).get(component or "")
            if component is not None and (graph is None or graph.has(name, layers[component])):
                found.setdefault(component, []).append(tensor)
    weights = {name: _sum_up(tensors) for name, tensors in found.items()}
    for path, size in contents.graphs.items():
        folder = path.partition("/")[0]
        # A graph is almost entirely weights, which optimum-cli usually writes in fp32.
        size += weights[folder].bytes if folder in weights else 0
        weights[folder] = Weights(size // 4, size // 4, "fp32", size)
    return weights


def _sum_up(tensors: Iterable[Tensor]) -> Weights:
    counts: dict[str, int] = {}
    products = 0
    for tensor in tensors:
        size = math.prod(tensor.shape)
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + size
        products += size if len(tensor.shape) in (2, 4) else 0
    most = max(counts, key=lambda kind: counts[kind])
    size = sum(count * WEIGHT_BYTES.get(_PRECISIONS.get(kind, ""), 1) for kind, count in counts.items())
    return Weights(sum(counts.values()), products, _PRECISIONS.get(most, most.lower()), size)


def _component_of(tensor: str, components: Sequence[str]) -> str | None:
    for prefix, owners in (*_PREFIXES, *((prefix, DENOISERS) for prefix in _BARE_DENOISER)):
        if tensor.startswith(prefix):
            return next((owner for owner in owners if owner in components), None)
    return None

"""Fuses LoRAs: every adapted weight W becomes W + scale * (alpha / rank) * up @ down.

diffusers translates the tensor names of the various trainers. The sum is computed here, on the stored tensors in fp32: diffusers'
fuse_lora loads the whole model, and scales layers wrongly if they differ in alpha or rank.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from img2img_server.bundle.manifest import Lora
from img2img_server.bundle.tokenizer_files import is_slow

from img2img_export.errors import ExportError, first_line
from img2img_export.options import LoraFile
from img2img_export.progress import Progress
from img2img_export.read.checkpoint import Layout
from img2img_export.read.digests import Digests
from img2img_export.read.texts import parse_json, read_json
from img2img_export.read.weights_file import TensorInfo, read_header, require_safetensors

if TYPE_CHECKING:
    import torch

_PAIRS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
)
"""Suffixes of a layer's two matrices, by trainer; all are converted to the last one, peft's."""

_DOWN, _UP = _PAIRS[-1]
_ENDS = ("down.weight", "up.weight", _DOWN, _UP, ".alpha")
"""Suffixes of names in a LoRA. Others belong to a DoRA, LoHa, LoKr or a full model; diffusers silently ignores some."""

_MOST_NAME = 512
"""Maximum characters of a tensor's name; real ones have up to about 150."""
_ADAPTER_METADATA = "lora_adapter_metadata"
_CONVERT_FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, re.error)


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
    for name, weights in additions.items():
        progress.stage(f"fusing {', '.join(lora.path.name for lora in loras)} into {name}")
        for file in files[name]:
            _rewrite(file, weights)
    return made


def _add(lora: LoraFile, directory: Path, layout: Layout, additions: Additions) -> None:
    """Reads a LoRA and adds its layers to `additions`."""
    try:
        tensors, config = _read(lora.path)
        layers = list(_layers(lora, _translate(lora.path, tensors, directory, layout), config, layout))
    except _CONVERT_FAILURES as error:
        raise ExportError(f"{lora.path} is not a LoRA that diffusers can read: {first_line(error)}") from error
    if not layers:
        raise ExportError(f"{lora.path} contains no LoRA layers for {layout.pipeline_class}")
    for component, name, layer in layers:
        additions.setdefault(component, {}).setdefault(name, []).append(layer)


def _layers(
    lora: LoraFile, tensors: Mapping[str, "torch.Tensor"], config: Mapping[str, Any], layout: Layout
) -> Iterator[tuple[str, str, _Layer]]:
    """Yields each layer of a LoRA with its component and the name of the adapted weight."""
    for key in tensors:
        module = key.removesuffix(_DOWN).removesuffix(_UP)
        if module == key or not {module + _DOWN, module + _UP} <= tensors.keys():
            raise ExportError(f"{lora.path} is not a plain LoRA of {layout.pipeline_class}: it contains {key}")
        component, _, name = module.partition(".")
        if component not in layout.components:
            raise ExportError(
                f"{lora.path} does not fit the model: it adapts {component}, which this {layout.pipeline_class} does not have"
            )
        if key.endswith(_DOWN):
            down, up = tensors[key].flatten(1), tensors[module + _UP].flatten(1)
            scale = lora.scale * _adapter_scale(config, component, name, len(down))
            if not (math.isfinite(scale) and down.isfinite().all() and up.isfinite().all()):
                raise ExportError(
                    f"{lora.path} is damaged: its alpha or its matrices for {module} contain NaN or infinite numbers; "
                    "download or copy it again"
                )
            yield component, f"{name}.weight", _Layer(lora.path, scale, down, up)


def _read(path: Path) -> tuple[dict[str, "torch.Tensor"], dict[str, Any]]:
    """A LoRA's tensors, with each alpha multiplied into its layer's matrix, and peft's configuration, if any."""
    import safetensors
    import safetensors.torch

    _, notes = read_header(path)
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ExportError(f"{path} is damaged or not a safetensors file: {first_line(error)}") from None
    if odd := next((key for key in tensors if not key.endswith(_ENDS) or len(key) > _MOST_NAME), None):
        raise ExportError(f"{path} is not a plain LoRA: it contains {odd[:_MOST_NAME]}")
    for key in [key for key in tensors if key.endswith(".alpha")]:
        layer = key.removesuffix(".alpha")
        pair = next(((layer + down, layer + up) for down, up in _PAIRS if {layer + down, layer + up} <= set(tensors)), None)
        if pair is None:
            raise ExportError(f"{path} is not a plain LoRA: it contains {key}, but no matrices for it")
        alpha, rank = float(tensors.pop(key)), len(tensors[pair[0]])
        tensors[pair[1]] = tensors[pair[1]].float() * (alpha / rank)
    return tensors, dict(parse_json(notes.get(_ADAPTER_METADATA, "{}")))


def _translate(path: Path, tensors: dict[str, "torch.Tensor"], directory: Path, layout: Layout) -> dict[str, "torch.Tensor"]:
    """Renames the tensors to peft's names: COMPONENT.MODULE.lora_A.weight and COMPONENT.MODULE.lora_B.weight."""
    import diffusers
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
    from diffusers.utils.state_dict_utils import StateDictType

    pipeline: Any = getattr(diffusers, layout.pipeline_class, None)
    if not hasattr(pipeline, "lora_state_dict"):
        raise ExportError(f"{path} cannot be fused: {layout.pipeline_class} does not support LoRAs")
    known: dict[str, Any] = {}
    if "unet" in layout.components:
        config = read_json(directory / "unet" / "config.json")
        known["unet_config"] = SimpleNamespace(**config)
    found = pipeline.lora_state_dict(dict(tensors), **known)
    found = found[0] if isinstance(found, tuple) else found
    texts = {key: value for key, value in found.items() if key.startswith("text_encoder")}
    others = {key: value for key, value in found.items() if key not in texts}
    for way in (StateDictType.DIFFUSERS_OLD, StateDictType.DIFFUSERS):
        texts = convert_state_dict_to_peft(texts, original_type=way)
    return {**convert_unet_state_dict_to_peft(others), **texts}


def _adapter_scale(config: Mapping[str, Any], component: str, module: str, rank: int) -> float:
    """alpha / rank from peft's configuration in the file's metadata, or 1 without one (alpha is in the matrices)."""
    alpha = config.get(f"{component}.lora_alpha")
    if alpha is None:
        return 1.0
    patterns: Mapping[str, float] = config.get(f"{component}.alpha_pattern") or {}
    if slow := next((pattern for pattern in patterns if is_slow(pattern, most_repeats=1)), None):
        raise ValueError(f"the pattern {slow[:80]!r} in its alpha_pattern can take very long to match")
    own = next((value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module)), alpha)
    return float(own) / (math.sqrt(rank) if config.get(f"{component}.use_rslora") else rank)


def _check(folder: Path, component: str, weights: Mapping[str, list[_Layer]]) -> list[Path]:
    """The files of a component that change. Raises ExportError if a weight is missing or has a different shape."""
    files = {file: read_header(file)[0] for file in sorted(folder.glob("*.safetensors"))}
    stored: dict[str, TensorInfo] = {name: info for tensors in files.values() for name, info in tensors.items()}
    for name, layers in weights.items():
        for layer in layers:
            if name not in stored:
                raise ExportError(f"{layer.file} does not fit {component}: it adapts {name}, which the model does not have")
            shape = stored[name].shape
            wanted, found = (shape[0], math.prod(shape[1:])), (len(layer.up), layer.down.shape[1])
            if wanted != found or layer.up.shape[1] != len(layer.down):
                raise ExportError(
                    f"{layer.file} does not fit {component}: {name} has shape {wanted} in the model and {found} in the LoRA"
                )
    return [file for file, tensors in files.items() if not weights.keys().isdisjoint(tensors)]


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

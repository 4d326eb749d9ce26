"""Reads a LoRA file: the names of kohya's trainer, of diffusers and of peft become those of the model's modules.

diffusers translates the names. The exporter, which fuses LoRAs into weights, and the server read them with this module.
"""

import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from img2img_server.bundle.adapter_files import AdapterProblem
from img2img_server.bundle.files import MOST_TENSORS, parse_json
from img2img_server.bundle.tokenizer_files import is_slow

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
_KINDS = {
    "dora_scale": "a DoRA",
    "magnitude_vector": "a DoRA",
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "lora_mid": "a Tucker LoCon",
}

_BARE = ("time_text_embed.", "x_embedder.", "context_embedder.", "norm_out.", "proj_out.")
"""Layers of Flux' transformer in kohya's files that diffusers translates without the name of the component."""
_CLIP = "text_model."
"""The prefix of CLIP's modules, which depends on the version of transformers that wrote them."""
_MOST_NAME = 512
"""Maximum characters of a tensor's name; real ones have up to about 150."""
_ADAPTER_METADATA = "lora_adapter_metadata"
_CONVERT_FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, re.error)


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """A LoRA's addition to the weight of `module` of the model's `component`: factor * up @ down, both flattened to matrices.

    `down` is [rank, in] or, for a convolution, [rank, in, h, w]; `up` is [out, rank]. `factor` is alpha / rank.
    """

    component: str
    module: str
    down: "torch.Tensor"
    up: "torch.Tensor"
    factor: float


def read_layers(
    path: Path, pipeline_class: str, components: Sequence[str], unet_config: Mapping[str, Any] | None
) -> list[LoraLayer]:
    """The layers of a LoRA for a pipeline class of diffusers with these `components`.

    `unet_config` is the UNet's config.json, None for a model without one. Raises AdapterProblem.
    """
    try:
        tensors, config = _read(path)
        layers = list(_layers(_translate(tensors, pipeline_class, unet_config), config, pipeline_class, components))
    except AdapterProblem:
        raise
    except _CONVERT_FAILURES as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise AdapterProblem(f"is not a LoRA that diffusers can read: {line}") from error
    if not layers:
        raise AdapterProblem(f"contains no LoRA layers for {pipeline_class}")
    return layers


def name_among(known: Container[str], name: str) -> str:
    """The name of a LoRA's module or weight as the model has it, one of `known`; `name` itself if it has none."""
    other = name.removeprefix(_CLIP) if name.startswith(_CLIP) else f"{_CLIP}{name}"
    return other if name not in known and other in known else name


def _layers(
    tensors: Mapping[str, "torch.Tensor"], config: Mapping[str, Any], pipeline_class: str, components: Sequence[str]
) -> Iterator[LoraLayer]:
    for key in tensors:
        module = key.removesuffix(_DOWN).removesuffix(_UP)
        if module == key or not {module + _DOWN, module + _UP} <= tensors.keys():
            raise AdapterProblem(f"is not a plain LoRA of {pipeline_class}: it contains {key}")
        component, _, name = module.partition(".")
        if component not in components:
            raise AdapterProblem(f"does not fit the model: it adapts {component}, which this {pipeline_class} does not have")
        if key.endswith(_DOWN):
            down, up = tensors[key], tensors[module + _UP].flatten(1)
            factor = _adapter_scale(config, component, name, len(down))
            if not (math.isfinite(factor) and down.isfinite().all() and up.isfinite().all()):
                raise AdapterProblem(
                    f"is damaged: its alpha or its matrices for {module} contain NaN or infinite numbers; "
                    "download or copy it again"
                )
            yield LoraLayer(component, name, down, up, factor)


def _read(path: Path) -> tuple[dict[str, "torch.Tensor"], dict[str, Any]]:
    """A LoRA's tensors, with each alpha multiplied into its layer's matrix, and peft's configuration, if any."""
    import safetensors
    import safetensors.torch

    try:
        with safetensors.safe_open(path, "pt") as file:
            notes = file.metadata() or {}
            if len(file.keys()) > MOST_TENSORS:
                raise AdapterProblem(f"has more than {MOST_TENSORS} tensors")
        tensors = safetensors.torch.load_file(path)
    except OSError as error:
        raise AdapterProblem(f"cannot be read: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise AdapterProblem(f"is damaged or not a safetensors file: {error}") from None
    if odd := next((key for key in tensors if not key.endswith(_ENDS) or len(key) > _MOST_NAME), None):
        kind = next((what for part, what in _KINDS.items() if part in odd), None)
        raise AdapterProblem(
            f"is {kind or 'not a plain LoRA'}{', not a plain LoRA' if kind else ''}: it contains {odd[:_MOST_NAME]}"
        )
    for key in [key for key in tensors if key.endswith(".alpha")]:
        layer = key.removesuffix(".alpha")
        pair = next(((layer + down, layer + up) for down, up in _PAIRS if {layer + down, layer + up} <= set(tensors)), None)
        if pair is None:
            raise AdapterProblem(f"is not a plain LoRA: it contains {key}, but no matrices for it")
        alpha, rank = float(tensors.pop(key)), len(tensors[pair[0]])
        tensors[pair[1]] = tensors[pair[1]].float() * (alpha / rank)
    return tensors, dict(parse_json(notes.get(_ADAPTER_METADATA, "{}")))


def _translate(
    tensors: dict[str, "torch.Tensor"], pipeline_class: str, unet_config: Mapping[str, Any] | None
) -> dict[str, "torch.Tensor"]:
    """Renames the tensors to peft's names: COMPONENT.MODULE.lora_A.weight and COMPONENT.MODULE.lora_B.weight."""
    import diffusers
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
    from diffusers.utils.state_dict_utils import StateDictType

    pipeline: Any = getattr(diffusers, pipeline_class, None)
    if not hasattr(pipeline, "lora_state_dict"):
        raise AdapterProblem(f"cannot be used: {pipeline_class} does not support LoRAs")
    known = {} if unet_config is None else {"unet_config": SimpleNamespace(**unet_config)}
    found = pipeline.lora_state_dict(dict(tensors), **known)
    found = found[0] if isinstance(found, tuple) else found
    found = {f"transformer.{key}" if key.startswith(_BARE) else key: value for key, value in found.items()}
    _check_complete(tensors, found, pipeline_class)
    texts = {key: value for key, value in found.items() if key.startswith("text_encoder")}
    others = {key: value for key, value in found.items() if key not in texts}
    for way in (StateDictType.DIFFUSERS_OLD, StateDictType.DIFFUSERS):
        texts = convert_state_dict_to_peft(texts, original_type=way)
    return {**convert_unet_state_dict_to_peft(others), **texts}


def _check_complete(tensors: Mapping[str, "torch.Tensor"], found: Mapping[str, "torch.Tensor"], pipeline_class: str) -> None:
    """Raises AdapterProblem for a layer of `tensors` that diffusers left out of `found`, as it does with some (a T5's), unless it
    is zero. The first row of a layer's first matrix is always kept as such a row, even if the layer is split into several."""
    if pipeline_class.startswith("ZImage"):
        return  # some of its files have layers twice, in two forms
    kept = {_first_row(value) for value in found.values()}
    for key, value in tensors.items():
        layer, up = next(
            ((key.removesuffix(down), key.removesuffix(down) + up) for down, up in _PAIRS if key.endswith(down)), ("", "")
        )
        if up in tensors and _first_row(value) not in kept and value.any() and tensors[up].any():
            raise AdapterProblem(f"adapts {layer[:_MOST_NAME]}, which LoRAs for {pipeline_class} cannot adapt: train it without")


def _first_row(matrix: "torch.Tensor") -> bytes:
    return matrix[:1].flatten().float().numpy().tobytes()


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

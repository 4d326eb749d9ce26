"""Dequantizes scaled 8-bit floats: weights stored as float8 with a separate scale become `weight * scale` in fp32.

ComfyUI's older files name the scale of `X.weight` `X.scale_weight` and have a tensor `scaled_fp8`; its newer files and those of
compressed-tensors use `X.weight_scale`, and may describe each layer in `X.comfy_quant` or in the metadata. DeepSeek's files use
`X.weight_scale_inv` for blocks of 128 x 128; despite its name it is a factor too.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from img2img_export.errors import ExportError
from img2img_export.read.texts import parse_json
from img2img_export.read.weights_file import TensorInfo

if TYPE_CHECKING:
    import torch

FLOAT8 = ("F8_E4M3", "F8_E5M2")
"""The supported float8 types, as in safetensors headers."""

_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
_INPUTS = re.compile(r"(.*\.)?(scale_input|input_scale|scaled_fp8|comfy_quant)")
"""Names of tensors that describe quantization and contain no weights."""
_LAYER = ".comfy_quant"
_METADATA = "_quantization_metadata"
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_BLOCK = 128

_QUANTIZED = (
    (re.compile(r".*\.(quant_state\.bitsandbytes__\w+|absmax|quant_map|SCB)"), "bitsandbytes"),
    (re.compile(r".*\.(qzeros|g_idx)"), "GPTQ or AWQ"),
    (re.compile(r".*\.(wscales|wzeros|smooth_factor(_orig)?)"), "Nunchaku (SVDQuant)"),
    (re.compile(r".*\.(weight_scale_2|weight_packed)"), "4-bit floats (nvfp4)"),
    (re.compile(r".*\.(qweight|weight\._(data|scale|zero_point))"), "integers"),
)
"""Names of tensors that occur only with other quantization methods."""


def refuse_other_quantization(what: str, tensors: Mapping[str, TensorInfo], notes: Mapping[str, str]) -> None:
    """Raises ExportError if weights are quantized other than as plain or scaled float8; `what` names the file."""
    advice = (
        "img2img reads float weights (scaled float8 too): choose the model in fp16, bf16 or fp32 (--precision int8 quantizes it)"
    )
    for pattern, kind in _QUANTIZED:
        if found := next(filter(pattern.fullmatch, tensors), None):
            raise ExportError(f"{what} is quantized with {kind} ({found}): {advice}")
    if found := _other_format(notes):
        raise ExportError(f"{what} is quantized as {found}: {advice}")
    for name, info in tensors.items():
        if name.endswith(".weight") and info.dtype[0] not in "FB":
            raise ExportError(f"{what} is quantized to integers ({name} is {info.dtype}): {advice}")


def _other_format(notes: Mapping[str, str]) -> str | None:
    """The first unsupported format of a layer in the file's metadata, or None."""
    try:
        layers = parse_json(notes.get(_METADATA, "{}")).get("layers", {}).values()
        return next((str(layer.get("format")) for layer in layers if layer.get("format") not in _FORMATS), None)
    except (ValueError, AttributeError):
        return f"an unknown format ({_METADATA} is malformed)"


def scales_of(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Maps the name of each scaled weight to the name of its scale."""
    found = {}
    for name in tensors:
        suffix = next((suffix for suffix in _SCALES if name.endswith(suffix)), None)
        weight = f"{name.removesuffix(suffix)}.weight" if suffix else ""
        if weight in tensors and tensors[weight].dtype in FLOAT8:
            found[weight] = name
    return found


def describes_scaling(name: str) -> bool:
    """Whether a tensor describes quantization and contains no weights."""
    return _INPUTS.fullmatch(name) is not None


def dequantize(path: object, checkpoint: Mapping[str, Any], scales: Mapping[str, str], names: Iterable[str]) -> dict[str, Any]:
    """The scaled weights among the tensors `names`, in fp32. Raises ExportError if a scale does not fit its weight."""
    made = {}
    for name in names:
        if name in scales:
            layer = f"{name.removesuffix('.weight')}{_LAYER}"
            if layer in checkpoint:
                _check_layer(path, layer, checkpoint[layer])
            made[name] = checkpoint[name].float() * _spread(path, scales[name], checkpoint[scales[name]], checkpoint[name].shape)
    return made


def _check_layer(path: object, name: str, value: Any) -> None:
    """Raises ExportError unless ComfyUI's description of a layer (JSON in bytes) has a float8 format."""
    try:
        kind = parse_json(bytes(value.flatten().tolist()))["format"]
    except (ValueError, LookupError, TypeError):
        kind = None
    if kind not in _FORMATS:
        raise ExportError(
            f"{path}: {name} declares that the layer is quantized as {kind}: only {' and '.join(_FORMATS)} are supported"
        )


def _spread(path: object, name: str, scale: "torch.Tensor", shape: "torch.Size") -> "torch.Tensor":
    """A scale (one value, one per row, or one per block) as a tensor that broadcasts to a weight's shape."""
    scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(())
    scale = scale.reshape(*scale.shape, *[1] * (len(shape) - scale.ndim))
    for axis, (size, count) in enumerate(zip(shape, scale.shape, strict=False)):
        if count in (1, size):
            continue
        block = _BLOCK if name.endswith("_inv") or size % count else size // count
        if -(-size // block) != count:
            raise ExportError(f"{path}: {name} has shape {tuple(scale.shape)}, which does not fit a weight of {tuple(shape)}")
        scale = scale.repeat_interleave(block, axis).narrow(axis, 0, size)
    if scale.ndim != len(shape):
        raise ExportError(f"{path}: {name} has {scale.ndim} axes, its weight {len(shape)}")
    return scale

"""A component's config.json as the server reads it: a field that is missing, or whose value no model can have, is an error that
names the file and the field.

Standard library only: the exporter uses it before heavy imports.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from img2img_server.bundle.files import DAMAGED, MOST_LAYERS, read_json
from img2img_server.errors import BundleError

CONFIG_NAME = "config.json"
_MOST_SIZE, _MOST_SIDE, _MOST_LIST, _MOST_LEVELS = 2**25, 4096, 4096, 10
_WINDOW, _MOST_WINDOW = ("window_size", "patch_size", "spatial_merge_size"), 64
"""The fields of windows in a vision tower's attention, and the maximum side of one in patches: Qwen2.5-VL's have 8."""
_PER_LEVEL = ("block_out_channels", "up_block_types", "layers_per_block", "transformer_layers_per_block")
"""Fields of UNets and their ControlNets that have an item for each level, if they are lists."""
_SHOWN = 60
"""Maximum characters of a wrong value in an error."""


class MissingField(BundleError, AttributeError, KeyError):
    """A field that is read is not in the configuration. As an AttributeError it makes `hasattr` and `getattr` with a default work
    as for any object."""

    __str__ = Exception.__str__  # KeyError's adds quotes


class ComponentConfig(dict[str, Any]):
    """The content of a config.json, or of the object in it that `within` names. Its values are attributes, too.

    Raises BundleError for a field of FIELDS with a value that no model can have.
    """

    _path, _within = Path(), ""

    def __init__(self, content: Mapping[str, Any], path: Path, within: str = "") -> None:
        super().__init__(content)
        self._path, self._within = path, within
        _check(content, path, within)
        if "cross_attention_dim" in self and "down_block_types" in self:
            levels = len(self["down_block_types"])
            for name in _PER_LEVEL:
                if isinstance(self.get(name), list) and len(self[name]) != levels:
                    raise self.problem(name, f"has {len(self[name])} items, and 'down_block_types' has {levels}")

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def __missing__(self, name: str) -> Any:
        raise MissingField(f"{self._path}: the field '{self._within}{name}' is missing: {_ADVICE}")

    def part(self, name: str) -> "ComponentConfig":
        """The object in the field `name`. Raises BundleError."""
        content = self[name]
        if not isinstance(content, Mapping):
            raise self.problem(name, f"is {_shown(content)}, not an object")
        return ComponentConfig(content, self._path, f"{self._within}{name}.")

    def problem(self, name: str, text: str) -> BundleError:
        """The error for a field with a wrong value: `text` says what is wrong."""
        return _wrong(self._path, self._within + name, text)


def read_config(folder: Path) -> ComponentConfig:
    """The configuration of the component in `folder`. Raises BundleError if it is damaged."""
    path = folder / CONFIG_NAME
    return ComponentConfig(read_object(path), path)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a bundle. Raises BundleError."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}: {_ADVICE}") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path} is not a JSON object: {_ADVICE}")
    return content


@contextmanager
def reading(config: Mapping[str, Any]) -> Iterator[None]:
    """Within it, errors about values of `config` that do not fit each other become BundleErrors that name its file."""
    try:
        yield
    except BundleError:
        raise
    except DAMAGED as error:
        where = getattr(config, "_path", CONFIG_NAME)
        raise BundleError(f"{where} does not describe a model ({error}): {_ADVICE}") from error


def refuse_wrong_fields(content: Any, path: Path, within: str = "") -> None:
    """Raises BundleError if the content of any component's config.json, or an object in it, has a field of FIELDS with a value
    that no model can have. Null passes: only what reads a field knows whether it may be null."""
    if isinstance(content, Mapping):
        _check({name: value for name, value in content.items() if value is not None}, path, within)
        for name, value in content.items():
            refuse_wrong_fields(value, path, f"{within}{name}.")


def _check(content: Mapping[str, Any], path: Path, within: str) -> None:
    for name, value in content.items():
        if name in FIELDS and not FIELDS[name].accepts(value):
            raise _wrong(path, within + name, f"is {_shown(value)}, not {FIELDS[name].text}")
    if all(isinstance(content.get(name), int) for name in _WINDOW) and not 1 <= (side := window_side(content)) <= _MOST_WINDOW:
        why = "by 'patch_size' and 'spatial_merge_size'"
        raise _wrong(path, f"{within}window_size", f"gives windows of {side} patches on a side {why}, not 1 to {_MOST_WINDOW}")


def window_side(vision: Mapping[str, Any]) -> int:
    """The side of a window in patches, of the attention of a vision tower with this configuration (Qwen2.5-VL)."""
    merge: int = vision["spatial_merge_size"]
    side: int = vision["window_size"] // vision["patch_size"] // merge * merge
    return side


def _wrong(path: Path, field: str, text: str) -> BundleError:
    return BundleError(f"{path}: the field '{field}' {text}: {_ADVICE}")


_ADVICE = "download the model again, or export it again"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of values: in words, and which they are."""

    text: str
    accepts: Callable[[Any], bool]

    @property
    def optional(self) -> "_Kind":
        """The same kind, or null."""
        return _Kind(f"{self.text} or null", lambda value: value is None or self.accepts(value))

    def listed(self, most: int = _MOST_LIST) -> "_Kind":
        """A list of 1 to `most` such values."""
        text = f"a list of 1 to {most} items, each {self.text}"
        return _Kind(text, lambda value: isinstance(value, list) and 1 <= len(value) <= most and all(map(self.accepts, value)))

    def __or__(self, other: "_Kind") -> "_Kind":
        return _Kind(f"{self.text} or {other.text}", lambda value: self.accepts(value) or other.accepts(value))


def _whole(most: int, least: int = 1) -> _Kind:
    return _Kind(
        f"a whole number from {least} to {most}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_NUMBER = _Kind("a finite number", _is_number)
_FACTOR = _Kind("a finite number other than 0", lambda value: _is_number(value) and value != 0)
_SWITCH = _Kind("true or false", lambda value: isinstance(value, bool))
_TEXT = _Kind("a text", lambda value: isinstance(value, str))
_SIZE, _SIDE, _LAYERS = _whole(_MOST_SIZE), _whole(_MOST_SIDE), _whole(MOST_LAYERS, 0)
_LEVELS = _SIZE.listed(_MOST_LEVELS)
_SIDES = (_SIDE | _SIDE.listed(2)).optional
_DEPTHS = _LAYERS | (_LAYERS | _LAYERS.listed()).listed(_MOST_LEVELS)

FIELDS: dict[str, _Kind] = {
    # denoisers and ControlNets
    "_class_name": _TEXT,
    "in_channels": _SIZE,
    "sample_size": _SIDES,
    "block_out_channels": _LEVELS,
    "down_block_types": _TEXT.listed(_MOST_LEVELS),
    "up_block_types": _TEXT.listed(_MOST_LEVELS),
    "mid_block_type": _TEXT.optional,
    "attention_type": _TEXT.optional,
    "layers_per_block": _LAYERS | _LAYERS.listed(_MOST_LEVELS),
    "transformer_layers_per_block": _DEPTHS,
    "reverse_transformer_layers_per_block": _DEPTHS.optional,
    "cross_attention_dim": (_SIZE | _SIZE.listed()).optional,
    "encoder_hid_dim": _SIZE.optional,
    "time_cond_proj_dim": _SIZE.optional,
    "addition_embed_type": _TEXT.optional,
    "addition_time_embed_dim": _SIZE.optional,
    "projection_class_embeddings_input_dim": _SIZE.optional,
    "num_layers": _LAYERS,
    "num_single_layers": _LAYERS,
    "joint_attention_dim": _SIZE,
    "pooled_projection_dim": _SIZE.optional,
    "guidance_embeds": _SWITCH,
    "zero_cond_t": _SWITCH,
    "pos_embed_max_size": _SIDE,
    "axes_dims_rope": _SIZE.listed(8),
    "axes_dims": _SIZE.listed(8),
    "conditioning_embedding_out_channels": _LEVELS,
    "conditioning_embedding_channels": _SIZE.optional,
    "num_control_type": _SIZE.optional,
    "num_mode": _SIZE.optional,
    "global_pool_conditions": _SWITCH,
    # VAEs
    "base_dim": _SIZE,
    "dim_mult": _LEVELS,
    "latent_channels": _SIZE,
    "z_dim": _SIZE,
    "scaling_factor": _FACTOR,
    "shift_factor": _NUMBER.optional,
    "latents_mean": _NUMBER.listed().optional,
    "latents_std": _FACTOR.listed().optional,
    "running_mean": _NUMBER.listed(),
    "running_var": _NUMBER.listed(),
    "batch_norm_eps": _NUMBER,
    "force_upcast": _SWITCH.optional,
    "mid_block_add_attention": _SWITCH,
    "temperal_downsample": _SWITCH.listed(_MOST_LEVELS),
    # text encoders, CLIP's image encoder and Qwen2.5-VL's vision tower
    "hidden_size": _SIZE,
    "num_hidden_layers": _LAYERS,
    "max_position_embeddings": _SIZE,
    "projection_dim": _SIZE,
    "use_attention_mask": _SWITCH.optional,
    "image_token_id": _whole(_MOST_SIZE, 0),
    "image_size": _SIDE,
    "patch_size": _SIDE | _SIDE.listed(_MOST_LEVELS),
    "num_heads": _SIZE | _SIZE.listed(_MOST_LEVELS),
    "window_size": _SIDE,
    "rope_theta": _Kind("a number of at least 1", lambda value: _is_number(value) and value >= 1),
    "spatial_merge_size": _SIDE,
}
"""The fields that the server and diffusers' pipelines read of components whose graphs they call, and which values they can have.
Other fields are not read."""

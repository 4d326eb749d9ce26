"""The folder of image adapters (IP-Adapters), and the models and image encoders that fit them: the shapes of a file's tensors
show what it needs, so nothing is loaded to compare them. Standard library only."""

import functools
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from img2img_server.bundle.adapter_files import SUFFIX, AdapterFiles, AdapterProblem
from img2img_server.bundle.files import DAMAGED, MOST_FILES, MOST_TENSORS, parse_json, read_json, read_safetensors_header
from img2img_server.bundle.image_encoders import EncoderWidths
from img2img_server.bundle.image_prompts import layer_widths
from img2img_server.bundle.manifest import Manifest

_log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of a file's tensors by name."""

PROJECTION, LAYERS = "image_proj.", "ip_adapter."
"""Prefixes of the names of tensors: of the image projection, and of the layers' keys and values."""
KEY, VALUE = "to_k_ip.weight", "to_v_ip.weight"
_LAYER = re.compile(r"ip_adapter\.([1-9][0-9]{0,3})\.to_([kv])_ip\.weight")
_FACE_ID = frozenset({"proj.0.weight", "proj.2.weight", "norm.weight"})
"""Parts of the image projection that only FaceID adapters have all. FaceID Plus have a perceiver_resampler, both have LoRAs."""
_MOST_VALUES = 20 * MOST_TENSORS
_MOST_SETTINGS = 2**16
"""Maximum bytes of an adapter's NAME.json."""
_ENCODER = "image_encoder"
"""The key of an adapter's NAME.json."""
_MOST_NAME = 100
"""Maximum characters of a tensor's name or of an id in a message."""


@dataclass(frozen=True, slots=True)
class PromptKind:
    """The properties that an image adapter shares with the models that it fits: the width of each cross-attention, in diffusers'
    order, and of the tokens that they read."""

    layer_widths: tuple[int, ...]
    text_width: int


@dataclass(frozen=True, slots=True)
class AdapterNeeds:
    """The requirements of an adapter's file. A "plain" one reads the `encoder_width` numbers of an image's embedding, and a
    "full" or "plus" one those of each hidden state."""

    kind: Literal["plain", "full", "plus"]
    encoder_width: int
    fits: PromptKind

    @property
    def reads_states(self) -> bool:
        """Whether it reads hidden states and not an embedding."""
        return self.kind != "plain"

    def reads(self, widths: EncoderWidths) -> bool:
        """Whether it reads the outputs of an image encoder of these widths."""
        return self.encoder_width == (widths.hidden_size if self.reads_states else widths.projection_dim)

    def __str__(self) -> str:
        what = "hidden states" if self.reads_states else "embeddings"
        return f"an image encoder with {what} of {self.encoder_width} numbers"


@dataclass(frozen=True, slots=True)
class ImageAdapterHeader:
    """An image adapter of the folder, by its header. `encoder` is the id of the image encoder that its NAME.json names, "" if
    there is none."""

    id: str
    needs: AdapterNeeds
    encoder: str = ""


class ImageAdapterFiles(AdapterFiles):
    """The folder of image adapters. `DIR/NAME.json`, if it exists, names the image encoder of `DIR/NAME.safetensors`:
    {"image_encoder": "ID"}."""

    what, flag, cache_flag = "image adapter", "--image-adapters", "--image-adapter-cache"

    def known(self) -> Iterator[ImageAdapterHeader]:
        """The adapters that can be used, in order of id. The log has the problems of others."""
        for name in self.ids():
            try:
                yield self.read(name)
            except AdapterProblem:
                continue

    def read(self, name: str) -> ImageAdapterHeader:
        """The adapter with the id `name`, by its header. Raises AdapterProblem."""
        path, found = self.locate(name)
        needs = _needs(path, found.st_ino, found.st_size, found.st_mtime_ns)
        if isinstance(needs, str):
            raise AdapterProblem(needs)
        return ImageAdapterHeader(name, needs, _named_encoder(path))


def needs_of(shapes: Shapes) -> AdapterNeeds:
    """The requirements of an adapter whose tensors have these shapes. Raises AdapterProblem for all files but IP-Adapters that
    read CLIP's image encoder."""
    parts = {name.removeprefix(PROJECTION) for name in shapes if name.startswith(PROJECTION)}
    if parts >= _FACE_ID or any("_lora." in name or "perceiver_resampler." in name for name in shapes):
        raise AdapterProblem(
            "is an IP-Adapter FaceID, which reads embeddings of faces instead of images: use another one, such as Plus Face"
        )
    layers = {name: shape for name, shape in shapes.items() if name.startswith(LAYERS)}
    if not parts or not layers:
        raise AdapterProblem(
            f"is not an IP-Adapter: it has no tensors named {PROJECTION}* and {LAYERS}*, as those of h94/IP-Adapter have"
        )
    text_width = _text_width(layers)
    fits = PromptKind(_widths(layers, text_width), text_width)
    if "proj.weight" in parts:
        return AdapterNeeds("plain", _side(shapes, "proj.weight", 1), fits)
    if "proj.3.weight" in parts:
        return AdapterNeeds("full", _side(shapes, "proj.0.weight", 1), fits)
    if {"latents", "proj_in.weight"} <= parts:
        return AdapterNeeds("plus", _side(shapes, "proj_in.weight", 1), fits)
    raise AdapterProblem("is an IP-Adapter of an unknown kind: known are those of h94/IP-Adapter, that is plain, full and plus")


def read_shapes(path: Path) -> Shapes:
    """The shapes of the tensors in a safetensors file, by its header. Raises AdapterProblem."""
    try:
        header, _ = read_safetensors_header(path)
        items = parse_json(header, _MOST_VALUES)
        items.pop("__metadata__", None)
        return {name: tuple(map(_number, item["shape"])) for name, item in items.items()}
    except OSError as error:
        raise AdapterProblem(f"cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise AdapterProblem("is damaged or not a safetensors file: download or copy it again") from None


def prompt_kind(bundle: Path, manifest: Manifest) -> PromptKind | None:
    """Which image adapters fit the model of a bundle. None if it takes no image prompts, as those of earlier versions, and if its
    configuration cannot be read: loading the bundle says why."""
    denoiser = next((part for part in manifest.components if part.image_prompts), None)
    if denoiser is None:
        return None
    try:
        config = read_json(bundle / denoiser.name / "config.json")
        widths = layer_widths(config)
        return PromptKind(widths, config["cross_attention_dim"]) if widths else None
    except DAMAGED:
        return None


def difference(adapter: PromptKind, model: PromptKind | None) -> str:
    """Why an adapter does not fit a model; "" if it does."""
    if model is None:
        return "the model takes no image prompts"
    if adapter.text_width != model.text_width:
        return f"it is for texts of {adapter.text_width} numbers a token, and those of the model have {model.text_width}"
    if len(adapter.layer_widths) != len(model.layer_widths):
        count = len(model.layer_widths)
        return f"it is for a model of {len(adapter.layer_widths)} cross-attentions, and this model has {count}"
    if adapter.layer_widths != model.layer_widths:
        return "its layers have other widths than the cross-attentions of the model"
    return ""


@functools.lru_cache(MOST_FILES)
def _needs(path: Path, inode: int, size: int, modified: int) -> AdapterNeeds | str:
    """The requirements of a file, or its problem, which is logged. A file is read again only after it was changed."""
    try:
        return needs_of(read_shapes(path))
    except AdapterProblem as problem:
        _log.warning("image adapter %s cannot be used: it %s", path, problem)
        return str(problem)


def _named_encoder(path: Path) -> str:
    """The image encoder that the file beside an adapter names. Raises AdapterProblem."""
    beside = path.with_name(path.name.removesuffix(SUFFIX) + ".json")
    try:
        named = read_json(beside, _MOST_SETTINGS)
    except FileNotFoundError:
        return ""
    except (OSError, ValueError):
        named = None
    if isinstance(named, dict) and named.keys() == {_ENCODER} and isinstance(name := named[_ENCODER], str) and name:
        return name
    raise AdapterProblem(f'has a file {beside.name} that is wrong: it must contain {{"{_ENCODER}": "ID"}} and nothing else')


def _text_width(layers: Shapes) -> int:
    """The width of the tokens that all layers read. Raises AdapterProblem."""
    widths = {shape[1] if len(shape) == 2 else 0 for shape in layers.values()}
    if len(widths) != 1 or 0 in widths:
        raise AdapterProblem(f"is damaged: its layers ({LAYERS}*) are not matrices of one width")
    return widths.pop()


def _widths(layers: Shapes, text_width: int) -> tuple[int, ...]:
    """The widths of the layers, in order. Raises AdapterProblem unless each has a key and a value of one shape, and they are
    numbered 1, 3, 5 and so on."""
    found: dict[int, dict[str, int]] = {}
    for name, shape in layers.items():
        matched = _LAYER.fullmatch(name)
        if matched is None:
            raise AdapterProblem(f"is an IP-Adapter of an unknown kind: it contains {name[:_MOST_NAME]}")
        found.setdefault(int(matched[1]), {})[matched[2]] = shape[0]
    numbers = sorted(found)
    if numbers != list(range(1, 2 * len(numbers), 2)):
        raise AdapterProblem(
            f"is not an IP-Adapter of Stable Diffusion 1, 2 or XL: its layers are not numbered {LAYERS}1, {LAYERS}3 and so on"
        )
    for number in numbers:
        if found[number].keys() != {"k", "v"} or found[number]["k"] != found[number]["v"]:
            raise AdapterProblem(f"is damaged: {LAYERS}{number} has no {KEY} and {VALUE} of one shape")
    return tuple(found[number]["k"] for number in numbers)


def _side(shapes: Shapes, part: str, axis: int) -> int:
    """The length of an axis of a matrix of the image projection. Raises AdapterProblem."""
    shape = shapes.get(PROJECTION + part, ())
    if len(shape) != 2 or shape[axis] == 0:
        raise AdapterProblem(f"is damaged: {PROJECTION}{part} is not a matrix")
    return shape[axis]


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("an axis is not an integer of at least 0")
    return value

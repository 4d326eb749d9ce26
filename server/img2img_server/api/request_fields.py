"""The table of TransformRequest's fields: which of them a model takes, with defaults and bounds. Parsing and GetModel read it.

A new field is one row here. If not every model takes it, its row says what a model without it lacks, and pipelines that take it
list it in their `fields`.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1 import model_pb2

from img2img_server.api.controls import MOST_CONTROLS
from img2img_server.api.image_prompts import MOST_IMAGES, MOST_PROMPTS
from img2img_server.api.loras import MOST_LORAS
from img2img_server.api.scales import MAX_SCALE
from img2img_server.config import (
    DEFAULT_GUIDANCE,
    DEFAULT_PROMPT,
    DEFAULT_QUALITY,
    DEFAULT_STEPS,
    DEFAULT_STRENGTH,
    MAX_GUIDANCE,
    MAX_PROMPT,
    ServerConfig,
)
from img2img_server.engine.request import Pipeline
from img2img_server.errors import InvalidField
from img2img_server.images import MAX_BLUR
from img2img_server.support.model_fields import FieldRule, ModelFields
from img2img_server.support.source_rule import MaskUse

_LARGEST_DOUBLE_SEED = 2.0**63 - 1024
"""The largest double that is a seed. The largest seed, 2^63 - 1, is not a double."""
_MOST_MADE = 256

_NO_IMAGE_PROMPTS = (
    "this model takes no image prompts: it needs a control graph that has inputs for them, and a server with a folder of image "
    "adapters"
)
_NO_MASK = "this model does not take a mask"
_MASK = (("mask", None, None), ("mask_blur", 0.0, MAX_BLUR), ("mask_invert", False, None), ("mask_paste", True, None))
"""The fields about masks, which masks.py checks: names, defaults and maxima."""


@dataclass(frozen=True, slots=True)
class RequestField:
    """A field of TransformRequest, or ("output.quality") of a message in it.

    `default` is None if it is not a fixed value. Numbers are in `minimum` to `maximum`; texts have as many characters. A model
    that does not take the field refuses it with `lacking`; every model takes a field that is `lacking` nothing. `max_count` is of
    repeated fields. `needs` is another field, without which this one has no effect. Fields of a control ("controls.scale") and of
    an image prompt are checked in controls.py and image_prompts.py.
    """

    name: str
    lacking: str = ""
    required: bool = False
    default: float | str | bool | None = None
    minimum: float | None = None
    maximum: float | None = None
    exclusive_minimum: bool = False
    max_count: int = 0
    needs: str = ""

    def check(self, value: float) -> None:
        """Raises InvalidField for a number that is out of bounds."""
        least, most = self.minimum, self.maximum
        assert least is not None, "numbers have bounds"
        assert most is not None, "numbers have bounds"
        if not (least < value <= most if self.exclusive_minimum else least <= value <= most):
            bounds = f"({least:g}, {most:g}]" if self.exclusive_minimum else f"{least:g} to {most:g}"
            raise InvalidField(self.name, f"{value} is not in {bounds}")


_OF_CONTROLS = "controls."
_CONTROL = (
    RequestField("controls.model", "this model has a built-in control input and takes no ControlNet"),
    RequestField(
        "controls.scale", "this model has no scale for its control image", default=1.0, minimum=-MAX_SCALE, maximum=MAX_SCALE
    ),
    RequestField("controls.start", "this model reads its control image in all steps", default=0.0, minimum=0, maximum=1),
    RequestField("controls.end", "this model reads its control image in all steps", default=1.0, minimum=0, maximum=1),
    RequestField("controls.control_mode", "this model reads images of one kind", minimum=0),
)
"""The fields of a control."""
_PROMPT = (
    RequestField("image_prompts.images", _NO_IMAGE_PROMPTS, max_count=MOST_IMAGES),
    RequestField("image_prompts.scale", _NO_IMAGE_PROMPTS, default=1.0, minimum=-MAX_SCALE, maximum=MAX_SCALE),
)
"""The fields of an image prompt."""
_INNER = frozenset(row.name for row in (*_CONTROL, *_PROMPT))
"""Fields of the elements of repeated fields, which have checks of their own."""


def _table(config: ServerConfig, size_multiple: int) -> tuple[RequestField, ...]:
    return (
        RequestField("model"),
        RequestField("prompt", default=DEFAULT_PROMPT, maximum=MAX_PROMPT),
        RequestField("negative_prompt", "this model reads no negative prompt", default="", maximum=MAX_PROMPT),
        RequestField("image", required=True),
        RequestField(
            "strength",
            "this model has no strength: it starts from noise and edits the image by the prompt",
            default=DEFAULT_STRENGTH,
            minimum=0,
            maximum=1,
            exclusive_minimum=True,
        ),
        RequestField("num_inference_steps", default=DEFAULT_STEPS, minimum=1, maximum=config.max_steps),
        RequestField(
            "guidance_scale", "this model has no guidance_scale", default=DEFAULT_GUIDANCE, minimum=0, maximum=MAX_GUIDANCE
        ),
        RequestField("true_cfg_scale", "this model has no true_cfg_scale", minimum=0, maximum=MAX_GUIDANCE),
        RequestField("seed", default=-1, minimum=-1, maximum=_LARGEST_DOUBLE_SEED),
        RequestField("image_count", default=1, minimum=1, maximum=config.max_image_count),
        RequestField("reference_images", "this model edits by one image: send only image", max_count=config.max_reference_images),
        *(
            RequestField(
                name,
                _NO_MASK,
                default=default,
                minimum=None if most is None else 0,
                maximum=most,
                needs="" if name == "mask" else "mask",
            )
            for name, default, most in _MASK
        ),
        RequestField("width", minimum=size_multiple),
        RequestField("height", minimum=size_multiple),
        RequestField("fit"),
        RequestField("scheduler", "this model supports only its own scheduler"),
        RequestField(
            "loras", "this model takes no LoRAs: it needs LoRA graphs, and a server with a folder of LoRAs", max_count=MOST_LORAS
        ),
        RequestField("fidelity"),
        RequestField(
            "controls",
            "this model takes no controls: it needs a control graph, which models of Stable Diffusion 1, 2 and XL have",
            max_count=MOST_CONTROLS,
        ),
        *_CONTROL,
        RequestField("image_prompts", _NO_IMAGE_PROMPTS, max_count=MOST_PROMPTS),
        *_PROMPT,
        RequestField("preview_interval", default=0, minimum=0, maximum=config.max_steps),
        RequestField("output.format"),
        RequestField("output.quality", default=DEFAULT_QUALITY, minimum=1, maximum=100),
        RequestField("output.as_asset", default=False),
    )


def fields_of(config: ServerConfig, pipeline: Pipeline) -> "RequestFields":
    """The fields that the model of a pipeline takes. Made once for all models that take the same ones."""
    own = frozenset(pipeline.fields.items())
    return _made(config, pipeline.size_multiple, own, bool(pipeline.schedulers), pipeline.source_rule.mask)


@functools.lru_cache(_MOST_MADE)
def _made(
    config: ServerConfig, size_multiple: int, own: frozenset[tuple[str, FieldRule]], schedulers: bool, mask: MaskUse
) -> "RequestFields":
    return RequestFields(_table(config, size_multiple), dict(own), schedulers, mask)


class RequestFields(Mapping[str, RequestField]):
    """The fields that a model takes, by name: those of the table `rows` that every model takes, its `own`, and if it has them
    `schedulers` and a `mask`."""

    def __init__(self, rows: Sequence[RequestField], own: ModelFields, schedulers: bool, mask: MaskUse) -> None:
        self._all = rows
        taken = {*own, *(["scheduler"] if schedulers else [])}
        if mask != "none":
            taken |= {name for name, *_ in _MASK}
        rows = [row for row in rows if not row.lacking or row.name in taken]
        rows = [replace(row, required=True) if row.name == "mask" and mask == "required" else row for row in rows]
        self._rows = {row.name: _by_rule(row, own.get(row.name, _NO_RULE)) for row in rows}
        self._needs = {name: rule.needs for name, rule in own.items() if rule.needs}

    def __getitem__(self, name: str) -> RequestField:
        return self._rows[name]

    def __iter__(self) -> Any:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def check(self, message: pb.TransformRequest) -> None:
        """Raises InvalidField for a field that is set and that the model does not take, or not without another one, and for too
        many elements. An empty text counts as unset."""
        for row in self._all:
            if row.name in _INNER:
                continue
            if row.name not in self._rows and row.lacking != _NO_MASK and is_set(message, row.name):
                raise InvalidField(row.name, f"{row.lacking}; leave {row.name} unset")
            if not self.uses(message, row.name) and is_set(message, row.name):
                needed = self._needs[row.name]
                raise InvalidField(row.name, f"this model uses it only with a {needed}: set {needed}, or leave {row.name} unset")
            if row.max_count and len(getattr(message, row.name)) > row.max_count:
                given = len(getattr(message, row.name))
                raise InvalidField(row.name, f"there are {given}, the maximum of this server is {row.max_count}")
            if row.name in self._rows and 0 < self._rows[row.name].max_count < len(getattr(message, row.name)):
                given, most = len(getattr(message, row.name)), self._rows[row.name].max_count
                raise InvalidField(row.name, f"there are {given}, the maximum of this model is {most}")
        self._check_controls(message)

    def _check_controls(self, message: pb.TransformRequest) -> None:
        """Raises InvalidField for a missing control that the model needs, and for fields of controls that it does not take.
        Defaults are accepted."""
        if "controls" not in self._rows:
            return
        if self._rows["controls"].required and not message.controls:
            raise InvalidField("controls", "this model reads a control image, such as edges or a depth map: send one")
        for index, control in enumerate(message.controls):
            for row in _CONTROL:
                own = row.name.removeprefix(_OF_CONTROLS)
                default = pb.ModelReference() if own == "model" else row.default
                if row.name not in self._rows and control.HasField(own) and getattr(control, own) != default:  # type: ignore[arg-type]
                    raise InvalidField(f"controls[{index}].{own}", f"{row.lacking}; leave {own} unset")

    def uses(self, message: pb.TransformRequest, name: str) -> bool:
        """Whether the request has the field that the model needs for the field `name`, if it needs one."""
        return name not in self._needs or is_set(message, self._needs[name])

    def used(self, message: pb.TransformRequest) -> frozenset[str]:
        """The fields that affect this request."""
        return frozenset(name for name in self._rows if self.uses(message, name))

    def number(self, message: pb.TransformRequest, name: str, without: float = 1.0) -> float:
        """The number of a field, or its default; `without` if the model does not take it in this request. Raises
        InvalidField."""
        if name not in self._rows or not self.uses(message, name):
            return without
        row = self._rows[name]
        *outer, own = name.split(".")
        holder: Any = functools.reduce(getattr, outer, message)
        if not holder.HasField(own):
            assert isinstance(row.default, int | float), f"{name} has a default"
            return row.default
        value: float = getattr(holder, own)
        row.check(value)
        return value

    def text(self, message: pb.TransformRequest, name: str) -> str | None:
        """The text of a field, None if it is not set. Raises InvalidField if it is too long."""
        value: str = getattr(message, name)
        most = self._rows[name].maximum if name in self._rows else None  # a text that the model does not take is empty
        if most is not None and len(value) > most:
            raise InvalidField(name, f"the text has {len(value)} characters, the maximum is {most:g}")
        return value if message.HasField(name) else None  # type: ignore[arg-type]

    def messages(self) -> list[model_pb2.RequestField]:
        """The fields as GetModel lists them."""
        return [_message(row) for row in self._rows.values()]


def is_set(message: pb.TransformRequest, name: str) -> bool:
    """Whether a field of a request asks for something. Empty texts and lists do not."""
    field = message.DESCRIPTOR.fields_by_name[name]
    return bool(getattr(message, name)) if field.is_repeated or field.type == field.TYPE_STRING else message.HasField(name)  # type: ignore[arg-type]


_NO_RULE = FieldRule()


def _by_rule(row: RequestField, rule: FieldRule) -> RequestField:
    """A row of the table as a model has it."""
    return replace(
        row,
        default=row.default if rule.default is None else rule.default,
        needs=rule.needs or row.needs,
        max_count=row.max_count if rule.max_count is None else min(row.max_count, rule.max_count),
        required=row.required or rule.required,
    )


def _message(row: RequestField) -> model_pb2.RequestField:
    kind = {bool: "default_switch", str: "default_text"}.get(type(row.default), "default_number")
    return model_pb2.RequestField(
        name=row.name,
        required=row.required,
        minimum=row.minimum,
        maximum=row.maximum,
        exclusive_minimum=row.exclusive_minimum,
        max_count=row.max_count,
        needs=row.needs,
        **({} if row.default is None else {kind: row.default}),  # type: ignore[arg-type]
    )

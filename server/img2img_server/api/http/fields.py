"""The fields of a form -> TransformRequest. This module checks their syntax; api/parsing.py checks their values."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from img2img.v1 import image_to_image_pb2 as pb

from img2img_server.api.fidelity import put_fidelity
from img2img_server.api.http import json_lists
from img2img_server.api.http.forms import Part, shown
from img2img_server.api.image_prompts import add_images
from img2img_server.api.loras import loras_from
from img2img_server.api.parsing import Reading
from img2img_server.config import DEFAULT_GUIDANCE, DEFAULT_STEPS, DEFAULT_STRENGTH, MAX_GUIDANCE, MAX_PROMPT
from img2img_server.errors import InvalidField
from img2img_server.images import MAX_BLUR
from img2img_server.sources.reading import begins_as_address

_LISTS = ("image[]", f"{json_lists.CONTROL_IMAGES}[]", f"{json_lists.PROMPT_IMAGES}[]")
"""Names of fields that may be sent more than once, as OpenAI's clients write them."""
_WHOLE = re.compile(r"[+-]?[0-9]{1,19}")
_NUMBER = re.compile(r"[+-]?([0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})([eE][+-]?[0-9]{1,4})?")
_SIZE = re.compile(r"([0-9]{1,19})[xX]([0-9]{1,19})")
_SWITCH = {"true": True, "1": True, "false": False, "0": False}
_FORMATS = {name.removeprefix("OUTPUT_FORMAT_").lower(): number for name, number in pb.OutputFormat.items() if number}
_AUTO = "auto"
_STEPS = {
    _AUTO: DEFAULT_STEPS,
    "low": DEFAULT_STEPS // 2,
    "medium": DEFAULT_STEPS,
    "standard": DEFAULT_STEPS,
    "high": 2 * DEFAULT_STEPS,
    "hd": 2 * DEFAULT_STEPS,
}
"""num_inference_steps by quality."""
VARIATION_STRENGTH = 0.5
"""The default strength of a variation, which has no prompt."""
_NO_GUIDANCE = 1.0
MAX_PARTIAL_IMAGES = 100


@dataclass(slots=True)
class Draft:
    """A request while its fields are read. With `as_url` its images are stored as assets, and their URLs are sent.

    `optional` fields have this API's defaults, which are dropped for models that do not take the fields.
    """

    message: pb.TransformRequest = field(default_factory=pb.TransformRequest)
    quality: str = _AUTO
    size: str = "auto"
    stream: bool = False
    partial_images: int = 0
    as_url: bool = False
    optional: list[str] = field(default_factory=list)

    @property
    def reading(self) -> Reading:
        """How the server reads the message."""
        return Reading(mask_by_alpha=True, optional=tuple(self.optional), preview_count=self.partial_images)


@dataclass(frozen=True, slots=True)
class FormField:
    """A field of the form. `put` sets it from its name and value, or raises InvalidField. `schema` is its OpenAPI schema. An
    `extension` is not part of OpenAI's API."""

    name: str
    put: Callable[[Draft, str, str], None]
    schema: dict[str, Any]
    help: str
    extension: bool = False


def read(parts: Sequence[Part], variation: bool) -> Draft:
    """Reads a request from a form. A `variation` needs no prompt. Raises InvalidField for the first invalid field."""
    draft, seen = Draft(), set[str]()
    listed: dict[str, list[pb.ImageSource]] = {json_lists.CONTROL_IMAGES: [], json_lists.PROMPT_IMAGES: []}
    for part in parts:
        name = part.name.removesuffix("[]") if part.name in _LISTS else part.name
        if name == "image":
            _put_source(draft.message.reference_images.add() if name in seen else draft.message.image, part)
        elif name in listed:
            listed[name].append(pb.ImageSource())
            _put_source(listed[name][-1], part)
        elif name == "mask":
            if name in seen:
                raise InvalidField(name, "the field is set more than once")
            _put_source(draft.message.mask, part)
        elif name in _BY_NAME:
            if name in seen:
                raise InvalidField(name, "the field is set more than once")
            _BY_NAME[name].put(draft, name, part.text)
        else:
            raise InvalidField(shown(name), _UNSUPPORTED.get(name, "unknown field: /openapi.json lists the fields"))
        seen.add(name)
    json_lists.add_control_images(draft.message.controls, listed[json_lists.CONTROL_IMAGES])
    add_images(draft.message.image_prompts, listed[json_lists.PROMPT_IMAGES], json_lists.PROMPT_IMAGES)
    _fill(draft, variation)
    return draft


def _fill(draft: Draft, variation: bool) -> None:
    """Sets this API's defaults, and values that depend on other fields."""
    message = draft.message
    if not message.HasField("prompt"):
        if not variation:
            raise InvalidField("prompt", "a prompt is required: describe what the image should become")
        message.prompt = ""
        if not message.HasField("guidance_scale"):
            message.guidance_scale = _NO_GUIDANCE
            draft.optional.append("guidance_scale")
    if variation and not message.HasField("strength"):
        message.strength = VARIATION_STRENGTH
        draft.optional.append("strength")
    if not message.HasField("num_inference_steps") and draft.quality != _AUTO:
        message.num_inference_steps = _STEPS[draft.quality]
    if draft.size == "auto":
        message.fit.native_area.SetInParent()
    message.output.as_asset = draft.as_url


def _put_source(source: pb.ImageSource, part: Part) -> None:
    data = bytes(part.data)
    if not part.is_file and begins_as_address(data):
        source.uri = part.text
    else:
        source.data = data


def _text(draft: Draft, name: str, value: str) -> None:
    setattr(draft.message, name, value)


def _number(draft: Draft, name: str, value: str) -> None:
    if not _NUMBER.fullmatch(value):
        raise InvalidField(name, f"'{shown(value)}' is not a number")
    setattr(draft.message, name, float(value))


def _integer(draft: Draft, name: str, value: str) -> None:
    if not _WHOLE.fullmatch(value):
        raise InvalidField(name, f"'{shown(value)}' is not a whole number")
    _set(draft.message, name, name, int(value))


def _set(message: Any, attribute: str, name: str, value: int) -> None:
    try:
        setattr(message, attribute, value)
    except ValueError:  # from protobuf: the value exceeds the field's type
        raise InvalidField(name, f"{value} is out of range") from None


def _switch(draft: Draft, name: str, value: str) -> None:
    setattr(draft.message, name, _SWITCH[_one_of(name, value, tuple(_SWITCH))])


def _put_loras(draft: Draft, name: str, value: str) -> None:
    draft.message.loras.extend(loras_from(value))


def _put_controls(draft: Draft, name: str, value: str) -> None:
    draft.message.controls.extend(json_lists.read_controls(value))


def _put_image_prompts(draft: Draft, name: str, value: str) -> None:
    draft.message.image_prompts.extend(json_lists.read_image_prompts(value))


def _put_fidelity(draft: Draft, name: str, value: str) -> None:
    put_fidelity(draft.message, value)


def _put_model(draft: Draft, name: str, value: str) -> None:
    draft.message.model.path = value


def _put_count(draft: Draft, name: str, value: str) -> None:
    if not _WHOLE.fullmatch(value):
        raise InvalidField(name, f"'{shown(value)}' is not a whole number")
    _set(draft.message, "image_count", name, int(value))


def _put_size(draft: Draft, name: str, value: str) -> None:
    draft.size = value.lower()
    if draft.size in ("auto", "source"):
        return
    if not (found := _SIZE.fullmatch(draft.size)):
        raise InvalidField(name, f"'{shown(value)}' is neither WIDTHxHEIGHT, such as 768x512, nor auto, nor source")
    _set(draft.message, "width", name, int(found[1]))
    _set(draft.message, "height", name, int(found[2]))


def _one_of(name: str, value: str, known: Sequence[str]) -> str:
    if value.lower() not in known:
        raise InvalidField(name, f"'{shown(value)}' is not one of {', '.join(known)}")
    return value.lower()


def _put_quality(draft: Draft, name: str, value: str) -> None:
    draft.quality = _one_of(name, value, tuple(_STEPS))


def _put_format(draft: Draft, name: str, value: str) -> None:
    draft.message.output.format = _FORMATS["jpeg" if value.lower() == "jpg" else _one_of(name, value, tuple(_FORMATS))]


def _put_compression(draft: Draft, name: str, value: str) -> None:
    if not _WHOLE.fullmatch(value):
        raise InvalidField(name, f"'{shown(value)}' is not a whole number")
    _set(draft.message.output, "quality", name, int(value) or 1)  # OpenAI's scale begins at 0


def _put_response_format(draft: Draft, name: str, value: str) -> None:
    draft.as_url = _one_of(name, value, ("b64_json", "url")) == "url"


def _put_stream(draft: Draft, name: str, value: str) -> None:
    draft.stream = _SWITCH[_one_of(name, value, tuple(_SWITCH))]


def _put_partial_images(draft: Draft, name: str, value: str) -> None:
    if not _WHOLE.fullmatch(value) or not 0 <= int(value) <= MAX_PARTIAL_IMAGES:
        raise InvalidField(name, f"'{shown(value)}' is not a whole number in 0 to {MAX_PARTIAL_IMAGES}")
    draft.partial_images = int(value)


def _put_background(draft: Draft, name: str, value: str) -> None:
    if value.lower() == "transparent":
        raise InvalidField(name, "transparent backgrounds are not supported: results are opaque")
    _one_of(name, value, ("auto", "opaque"))


def _accept(draft: Draft, name: str, value: str) -> None:
    """Ignores a field that only OpenAI's own servers use."""


FIELDS = (
    FormField("prompt", _text, {"type": "string", "maxLength": MAX_PROMPT}, "What the image should become. Required for edits"),
    FormField("model", _put_model, {"type": "string"}, "Id of the model, as GET /v1/models lists it. Default: the server's own"),
    FormField("n", _put_count, {"type": "integer", "minimum": 1, "default": 1}, "Number of images, at most --max-image-count"),
    FormField(
        "size",
        _put_size,
        {"type": "string", "default": "auto"},
        "WIDTHxHEIGHT in pixels, such as 768x512; auto: the source's aspect, with as many pixels as the model was trained on; "
        "source: the source's size",
    ),
    FormField(
        "quality",
        _put_quality,
        {"type": "string", "enum": list(_STEPS), "default": "auto"},
        "The number of steps, unless num_inference_steps is set: "
        f"low {_STEPS['low']}, medium and standard {DEFAULT_STEPS}, high and hd {_STEPS['high']}; auto: the model's default",
    ),
    FormField("output_format", _put_format, {"type": "string", "enum": list(_FORMATS), "default": "png"}, "Format of the images"),
    FormField(
        "output_compression",
        _put_compression,
        {"type": "integer", "minimum": 0, "maximum": 100, "default": 90},
        "Quality of JPEG and WebP; no effect on PNG",
    ),
    FormField(
        "response_format",
        _put_response_format,
        {"type": "string", "enum": ["b64_json", "url"], "default": "b64_json"},
        "b64_json: images are in the answer; url: images are kept as assets, and their addresses sent",
    ),
    FormField(
        "stream",
        _put_stream,
        {"type": "boolean", "default": False},
        "Answer with server-sent events as the request proceeds",
    ),
    FormField(
        "partial_images",
        _put_partial_images,
        {"type": "integer", "minimum": 0, "maximum": MAX_PARTIAL_IMAGES, "default": 0},
        "With stream: the most previews to send, JPEGs of an eighth of the result's width and height",
    ),
    FormField("background", _put_background, {"type": "string", "enum": ["auto", "opaque"]}, "Results are opaque"),
    FormField("user", _accept, {"type": "string"}, "Accepted for compatibility. Clients are known by their tokens"),
    FormField("negative_prompt", _text, {"type": "string", "maxLength": MAX_PROMPT}, "What the image should not become", True),
    FormField(
        "strength",
        _number,
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        f"How far to leave the source; only for models that have a strength. Default: {DEFAULT_STRENGTH} for edits, "
        f"{VARIATION_STRENGTH} for variations",
        True,
    ),
    FormField(
        "num_inference_steps",
        _integer,
        {"type": "integer", "minimum": 1},
        "Steps of the whole schedule, of which strength times as many run; at most --max-steps (100). Default: by quality",
        True,
    ),
    FormField(
        "guidance_scale",
        _number,
        {"type": "number", "minimum": 0, "maximum": MAX_GUIDANCE},
        f"Classifier-free guidance. Default: the model's, mostly {DEFAULT_GUIDANCE}, and 1 for variations without a prompt",
        True,
    ),
    FormField(
        "true_cfg_scale",
        _number,
        {"type": "number", "minimum": 0, "maximum": MAX_GUIDANCE},
        "Guidance away from negative_prompt, for models such as Qwen-Image and Flux Kontext. Default: the model's",
        True,
    ),
    FormField(
        "seed",
        _integer,
        {"type": "integer", "minimum": -1, "default": -1},
        "Seed of the first image; the next ones take seed + 1, seed + 2 ...; -1: random",
        True,
    ),
    FormField(
        "mask_blur",
        _number,
        {"type": "number", "minimum": 0, "maximum": MAX_BLUR, "default": 0},
        "Softens the mask's edges by so many pixels of the mask",
        True,
    ),
    FormField("mask_invert", _switch, {"type": "boolean", "default": False}, "Redraw what is opaque in the mask", True),
    FormField(
        "mask_paste",
        _switch,
        {"type": "boolean", "default": True},
        "Outside the mask, the result has the source's pixels",
        True,
    ),
    FormField("scheduler", _text, {"type": "string"}, "A scheduler that GET /v1/models lists. Default: the model's own", True),
    FormField(
        "loras",
        _put_loras,
        {"type": "string"},
        "LoRAs of the server for this request: ID or ID:SCALE, several separated by commas. Default: none",
        True,
    ),
    FormField(
        "controls",
        _put_controls,
        {"type": "string"},
        "ControlNets of the server that the result follows: ID, ID:SCALE, ID:SCALE:START, ID:SCALE:START:END or "
        "ID:SCALE:START:END:MODE, several separated by commas; or a JSON list of objects with model, image (an address), scale, "
        f"start, end and control_mode. The images of those without an address are sent as {json_lists.CONTROL_IMAGES}. Not "
        "needed for models with a built-in control input, which take an empty ID, as in :0.5. Default: none",
        True,
    ),
    FormField(
        "image_prompts",
        _put_image_prompts,
        {"type": "string"},
        "Image adapters (IP-Adapters) of the server, which read images that the result follows: ID or ID:SCALE, several "
        "separated by commas; or a JSON list of objects with adapter, images (addresses) and scale. The images of those "
        f"without addresses are sent as {json_lists.PROMPT_IMAGES}: all for the only one, or one for each. Default: none",
        True,
    ),
    FormField(
        "fidelity",
        _put_fidelity,
        {"type": "string", "default": "exact"},
        "How near the images must be to the exact ones, for speed: exact, high, fast, a least PSNR such as 32dB, or a least SSIM "
        "such as 0.95",
        True,
    ),
)
"""All fields except images: `image`, `mask`, `control_image` and `prompt_image`."""
_BY_NAME = {one.name: one for one in FIELDS}
_UNSUPPORTED = {
    "input_fidelity": "input_fidelity is not supported: set strength, which says how far to leave the source",
}
"""Fields that are refused by name, with the reason."""

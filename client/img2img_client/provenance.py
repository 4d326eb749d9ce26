"""How an image was made, as an img2img server wrote it into the file."""

import html
import io
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from PIL import Image

from img2img_client.values import Level, ModelReference

if TYPE_CHECKING:
    from img2img_client.options import TransformOptions

_KEY = "img2img"
_XMP_RECORD = re.compile(rb"<img2img:record>(.*?)</img2img:record>", re.DOTALL)


def read_provenance(data: bytes) -> Mapping[str, Any] | None:
    """The record in an image file: the JSON object that docs/security.md describes. None if the file has none.

    ValueError if the bytes are not an image file, or the record is damaged. Records are not authenticated: anyone can write one.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()  # PNG text may follow the pixels
            text = image.info.get(_KEY)
            packet = image.info.get("xmp")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image cannot be read: {error}") from None
    found = _XMP_RECORD.search(packet) if isinstance(packet, bytes) else None
    if found is not None:
        text = html.unescape(found.group(1).decode("utf-8", "replace"))
    if not isinstance(text, str):
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the img2img record in the image is damaged: {error}") from None
    if not isinstance(record, dict):
        raise ValueError("the img2img record in the image is damaged: it is not a JSON object")
    return record


def recorded_options(record: Mapping[str, Any]) -> "TransformOptions":
    """The options of the request that made the image, from its record. The mask, reference images, controls and image prompts are
    left out, since a record has no images. Raises ValueError if an option is missing or has a wrong type."""

    def field(name: str, *kinds: type) -> Any:
        value = record.get(name)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ValueError(f"the img2img record in the image is damaged: {name} is {value!r}")
        return value

    return {
        "model": ModelReference(path=field("model", str)),
        "prompt": field("prompt", str),
        "negative_prompt": field("negative_prompt", str, type(None)),
        "strength": field("strength", int, float, type(None)),
        "num_inference_steps": field("num_inference_steps", int),
        "guidance_scale": field("guidance_scale", int, float, type(None)),
        "true_cfg_scale": field("true_cfg_scale", int, float, type(None)) if record.get("negative_prompt") is not None else None,
        "scheduler": field("scheduler", str, type(None)),
        "loras": _loras(record.get("loras", [])),
        "seed": field("seed", int),
        "width": field("width", int),
        "height": field("height", int),
        "format": field("format", str),
        "quality": field("quality", int, type(None)),
        **_bound(record.get("fidelity")),
    }


def _bound(found: Any) -> "TransformOptions":
    """The option for a recorded bound: a level, decibels ("32 dB") or an SSIM ("0.95"); none if there was none."""
    try:
        if found is None:
            return {}
        if found in get_args(Level):
            return {"fidelity": found}
        return {"min_psnr_db": float(found.removesuffix("dB"))} if found.endswith("dB") else {"min_ssim": float(found)}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"the img2img record in the image is damaged: fidelity is {found!r}") from None


def _loras(found: Any) -> dict[str, float]:
    try:
        return {str(lora["id"]): float(lora["scale"]) for lora in found}
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"the img2img record in the image is damaged: loras is {found!r}") from None

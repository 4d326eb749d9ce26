"""How an image was made, as an img2img server wrote it into the file."""

import html
import io
import json
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

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

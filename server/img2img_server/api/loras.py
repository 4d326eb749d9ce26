"""The LoRAs of a request: parsed from text, checked, and found in the server's folder."""

from collections.abc import Sequence

from img2img.v1 import image_to_image_pb2 as pb

from img2img_server.api.scales import check_scale, scale_of
from img2img_server.bundle.adapter_files import AdapterProblem, LoraFiles
from img2img_server.engine.request import LoraUse
from img2img_server.errors import InvalidField

MOST_LORAS = 8
_SHOWN = 100
"""Maximum characters of an id in an error message."""


def check_loras(message: pb.TransformRequest) -> None:
    """Checks the fields of a message's LoRAs, at most MOST_LORAS (request_fields.py). Raises InvalidField."""
    seen: dict[str, int] = {}
    for index, lora in enumerate(message.loras):
        if not lora.id:
            raise InvalidField(f"loras[{index}].id", "the id is empty: set one that ListLoras lists")
        if lora.id in seen:
            name = lora.id[:_SHOWN]
            raise InvalidField(f"loras[{index}].id", f"LoRA '{name}' is also loras[{seen[lora.id]}]: name each LoRA once")
        seen[lora.id] = index
        check_scale(lora, f"loras[{index}]")


def find_loras(loras: Sequence[pb.Lora], files: LoraFiles) -> tuple[LoraUse, ...]:
    """The LoRAs of a checked message. Raises InvalidField for one that the server does not have. Blocks."""
    found = []
    for index, lora in enumerate(loras):
        try:
            found.append(LoraUse(lora.id, scale_of(lora), files.find(lora.id).digest))
        except AdapterProblem as problem:
            raise InvalidField(f"loras[{index}].id", f"LoRA '{lora.id[:_SHOWN]}' {problem}") from None
    return tuple(found)


def loras_from(text: str) -> list[pb.Lora]:
    """The LoRAs of a text, as `scaled_ids` reads it. Raises InvalidField."""
    return [pb.Lora(id=name, scale=scale) for name, scale in scaled_ids(text, "loras")]


def scaled_ids(text: str, field: str) -> list[tuple[str, float | None]]:
    """The ids and scales of "ID" or "ID:SCALE", several separated by commas: the text after the last colon is the scale if it is
    a number. Raises InvalidField, naming `field`."""
    return [_scaled_id(part.strip(), field) for part in text.split(",")] if text.strip() else []


def _scaled_id(text: str, field: str) -> tuple[str, float | None]:
    name, colon, last = text.rpartition(":")
    if not text or (colon and not name):
        raise InvalidField(field, "an id is empty: write ID or ID:SCALE, several separated by commas")
    try:
        return (name, float(last)) if colon else (text, None)
    except ValueError:
        return text, None

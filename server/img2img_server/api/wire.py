"""Checks a protobuf message's bytes before it is parsed: the number of fields and repeated elements, and their sizes.

A parsed message can take many times the memory of its bytes: an empty string in a repeated field is 2 bytes on the wire and 16 or
more when parsed. The limits are derived from the message's descriptor, so they apply to new fields automatically.
https://protobuf.dev/programming-guides/encoding/
"""

import functools
from collections import Counter
from dataclasses import dataclass

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from img2img_server.errors import InvalidField, MalformedMessage

MAX_FIELDS = 1024
"""Maximum fields of a message including nested messages and unknown fields."""
MAX_ELEMENTS = 256
"""Maximum elements of one repeated field or entries of a map."""
MAX_VALUE_BYTES = 64 * 2**10
"""Maximum bytes of a string or bytes field that does not contain an image."""
_MAX_DEPTH = 16

_IMAGES = {
    "img2img.v1.ImageSource.data",
    "img2img.v1.ImageSource.uri",
    "img2img.v1.UploadAssetRequest.chunk",
    "inference.InferParameter.string_param",
    "inference.InferTensorContents.bytes_contents",
    "inference.InferTensorContents.uint_contents",
    "inference.ModelInferRequest.raw_input_contents",
}
"""Fields that may contain an image. Only the message's size limits them."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
_FIXED_SIZES = {
    FieldDescriptor.TYPE_DOUBLE: 8,
    FieldDescriptor.TYPE_FIXED64: 8,
    FieldDescriptor.TYPE_SFIXED64: 8,
    FieldDescriptor.TYPE_FLOAT: 4,
    FieldDescriptor.TYPE_FIXED32: 4,
    FieldDescriptor.TYPE_SFIXED32: 4,
}
_TEXTS = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
_PARSED_ELEMENT = 8
"""Maximum bytes of a parsed element of a packed field."""
_CONTINUED = bytes(range(128, 256))
"""All bytes of a varint except its last."""


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    repeated: bool
    message: Descriptor | None
    is_text: bool
    holds_image: bool
    fixed_size: int
    """Bytes of a packed element, 0 for a varint."""


@functools.cache
def _fields(descriptor: Descriptor) -> dict[int, _Field]:
    return {
        number: _Field(
            field.name,
            field.is_repeated,
            field.message_type,
            field.type in _TEXTS,
            field.full_name in _IMAGES,
            _FIXED_SIZES.get(field.type, 0),
        )
        for number, field in descriptor.fields_by_number.items()
    }


def check(data: bytes, descriptor: Descriptor) -> int:
    """Checks the bytes of a message of `descriptor`'s type. Returns the approximate bytes of the parsed message.

    Takes a few microseconds per field and stops at the first exceeded limit. Raises InvalidField, naming the field, or
    MalformedMessage.
    """
    walk = _Walk(data)
    walk.message(0, len(data), descriptor, "", 0)
    return len(data) + walk.unpacked


class _Walk:
    """One pass over `data`. `unpacked` counts the additional bytes that packed elements take when parsed."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._seen = 0
        self.unpacked = 0

    def message(self, at: int, end: int, descriptor: Descriptor, path: str, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise MalformedMessage(f"the message is nested more than {_MAX_DEPTH} levels deep")
        fields, counts = _fields(descriptor), Counter[int]()
        while at < end:
            self._seen += 1
            if self._seen > MAX_FIELDS:
                raise MalformedMessage(f"the message has more than {MAX_FIELDS} fields")
            key, at = self._varint(at, end)
            number, kind = key >> 3, key & 7
            if kind == _VARINT:
                start, (_, at) = at, self._varint(at, end)
            elif kind == _LENGTH:
                length, start = self._varint(at, end)
                at = start + length
            elif kind in _FIXED:
                start, at = at, at + _FIXED[kind]
            else:
                raise _malformed()
            if at > end:
                raise _malformed()
            field = fields.get(number)
            if field is not None:
                name = f"{path}{field.name}"
                self._value(field, name, kind, start, at, depth)
                counts[number] += self._elements(field, kind, start, at)
                is_pixels = field.holds_image and not field.is_text
                if field.repeated and counts[number] > MAX_ELEMENTS and not is_pixels:
                    raise InvalidField(_shown(name), f"the field has more than {MAX_ELEMENTS} elements")

    def _value(self, field: _Field, name: str, kind: int, start: int, end: int, depth: int) -> None:
        if kind != _LENGTH:
            return
        if field.message is not None:
            self.message(start, end, field.message, f"{name}.", depth + 1)
        elif field.is_text and end - start > MAX_VALUE_BYTES and not field.holds_image:
            raise InvalidField(_shown(name), f"the field has {end - start} bytes, the maximum is {MAX_VALUE_BYTES}")

    def _elements(self, field: _Field, kind: int, start: int, end: int) -> int:
        """The number of elements in one occurrence of a field: several if it is packed."""
        if kind != _LENGTH or field.message is not None or field.is_text:
            return 1
        if field.fixed_size:
            return (end - start) // field.fixed_size
        count = len(self._data[start:end].translate(None, _CONTINUED))
        self.unpacked += count * _PARSED_ELEMENT
        return count

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """A varint's value and its end offset."""
        value = shift = 0
        while at < end and shift < 70:
            byte = self._data[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value, at
        raise _malformed()


def _malformed() -> MalformedMessage:
    return MalformedMessage("the message cannot be parsed as this method's request type")


def _shown(path: str) -> str:
    """The path as other errors name it: TransformStream wraps the same request as Transform."""
    return path.removeprefix("request.")

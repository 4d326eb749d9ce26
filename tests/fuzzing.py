"""Messages of any type that hypothesis can think of, by its descriptor: valid, nearly valid, extreme, and bytes that are none."""

from typing import Any

import hypothesis.strategies as st
from fuzz_parts.seeds import VALID, image_file
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

_TEXTS = [
    *(
        "",
        "m",
        "second",
        "demo",
        "../second",
        "/etc/passwd",
        "m\0",
        "x" * 5_000,
        "é" * 4_097,
        "z" * 100_000,
        "\x1b[31m",
        "%s%n{0}",
    ),
    *("acme/m", "acme/../m", "--output=/tmp/x", "r1", "*", "**/../../*", "[", "DDIMScheduler", "Euler a"),
    *("data:,", "data:image/png;base64,", "data:;base64,@@@", "data:" + "A" * 70_000, "asset:", "asset:" + "0" * 64, "ASSET:x"),
    *(
        "http://127.0.0.1:1/",
        "https://[::1]/",
        "http://169.254.169.254/latest",
        "file:///etc/passwd",
        "gopher://x",
        "http://[",
        "//",
    ),
    *("0" * 64, "f" * 64, "F" * 64, "g" * 64, "../" * 22, "image/png", "image/jpeg", "text/html"),
]
_INTEGERS = [0, 1, -1, 2, 7, 8, 16, 24, 64, 99, 100, 101, 2**15, 2**31 - 1, -(2**31)]
_LONG = [*_INTEGERS, 2**32, 2**63 - 1, 2**63 - 2, -(2**63)]
_PNG = image_file()
_FILES = [
    b"",
    _PNG,
    _PNG[:-20],
    _PNG[:30],
    b"GIF89a",
    b"\xff\xd8\xff\xe0" + bytes(64),
    b"RIFF\x10\0\0\0WEBPVP8 ",
    b"II*\0" + bytes(16),
]

_SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_STRING: st.sampled_from(_TEXTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    FieldDescriptor.CPPTYPE_INT32: st.sampled_from(_INTEGERS) | st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: st.sampled_from(_LONG) | st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats() | st.sampled_from([0.0, 0.5, 1.0, 1.0000001, 7.5, 30.0, 5e-324]),
    FieldDescriptor.CPPTYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    # Open enumerations: any number may come.
    FieldDescriptor.CPPTYPE_ENUM: st.integers(0, 4) | st.integers(-(2**31), 2**31 - 1),
}
_BYTES = st.sampled_from(_FILES) | st.binary(max_size=200)


def messages(descriptor: Descriptor, depth: int = 4) -> st.SearchStrategy[Message]:
    """Any message of a type: each field unset or anything at all, also deep inside."""
    kind = message_factory.GetMessageClass(descriptor)
    fields = {field.name: _values(field, depth) for field in descriptor.fields if depth or field.message_type is None}
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: kind(**values))


def nearly_valid(descriptor: Descriptor) -> st.SearchStrategy[Message]:
    """A message that would be served, with up to two of its fields replaced."""
    valid = VALID.get(descriptor.name)
    if not valid or not descriptor.fields:
        return messages(descriptor)
    changes = st.lists(st.sampled_from(list(descriptor.fields)).flatmap(lambda field: _change(descriptor, field)), max_size=2)
    return st.builds(_changed, st.sampled_from(valid), changes)


def wires(descriptor: Descriptor) -> st.SearchStrategy[bytes]:
    """Possible input in place of a message: a valid one, two in one (both members of a oneof), or none."""
    sound = (messages(descriptor) | nearly_valid(descriptor)).map(lambda message: message.SerializeToString())
    twice = st.tuples(sound, sound).map(b"".join)
    torn = st.tuples(sound, st.integers(0, 300)).map(lambda pair: pair[0][: pair[1]])
    return st.one_of(sound, sound, sound, twice, torn, st.binary(max_size=100))


def calls(method: MethodDescriptor) -> st.SearchStrategy[list[bytes]]:
    """The messages of a call: one, or any number if the caller streams."""
    one = wires(method.input_type)
    return st.lists(one, max_size=5) if method.client_streaming else one.map(lambda data: [data])


def _values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (_values(field.message_type.fields_by_name[name], depth - 1) for name in ("key", "value"))
        return st.dictionaries(key, value, max_size=4)
    if field.message_type is not None:
        one: st.SearchStrategy[Any] = messages(field.message_type, depth - 1)
    elif field.type == FieldDescriptor.TYPE_BYTES:
        one = _BYTES
    else:
        one = _SCALARS[field.cpp_type]
    return st.lists(one, max_size=4) if field.is_repeated else one


def _change(descriptor: Descriptor, field: FieldDescriptor) -> st.SearchStrategy[tuple[FieldDescriptor, Message]]:
    """The field, and a message in which it is set to anything."""
    kind = message_factory.GetMessageClass(descriptor)
    made: Any = _values(field, 4) if field.message_type is None or field.is_repeated else _within(field)
    return st.tuples(st.just(field), made.map(lambda value: kind(**{field.name: value})))


def _within(field: FieldDescriptor) -> st.SearchStrategy[Message]:
    return nearly_valid(field.message_type) | messages(field.message_type, 3)


def _changed(valid: Message, changes: list[tuple[FieldDescriptor, Message]]) -> Message:
    message = type(valid)()
    message.CopyFrom(valid)
    for field, change in changes:
        message.ClearField(field.name)
        message.MergeFrom(change)
    return message

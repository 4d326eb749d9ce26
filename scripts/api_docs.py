"""The reference of the contract, docs/api.md, made of what is written elsewhere: the comments of the .proto files, and the errors
that the server has. `--check` fails where the page says something else; `--reasons` prints the errors alone, as JSON, and fails
where a release had one that is gone or has another code."""

import argparse
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)
from google.rpc import error_details_pb2
from img2img_server import errors
from img2img_server.api.interceptors import DOMAIN, to_status

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "api.md"
RELEASED_REASONS = REPOSITORY / "protos" / "released" / "img2img.v1.reasons.json"
PACKAGE = "img2img.v1"
_FILES = tuple(f"img2img/v1/{name}.proto" for name in ("image_to_image", "model", "asset"))
"""In the order of the page."""
_DETAILS = (error_details_pb2.BadRequest, error_details_pb2.RetryInfo)

_HEAD = """\
# API reference of img2img.v1

<!-- Made by scripts/api_docs from protos/img2img/v1/*.proto and server/img2img_server/errors.py: edit those. -->

What may be sent and what comes back, from the comments of [the .proto files](../protos/img2img/v1). A field that is marked
*optional* tells unset from zero; the others have proto3's zero where they are not set. Bounds that a server may change are
settings ([operations.md](operations.md)). [compatibility.md](compatibility.md) says what of this stays as it is.

A server also answers `grpc.health.v1.Health` (for the services `""`, `img2img.v1.ImageToImageService` and `models/ID`), and
reflection.
"""

_ERRORS_HEAD = """\
## Errors

The `google.rpc.Status` of each has an `ErrorInfo` with the domain `img2img`, the reason and, as metadata, `request_id`. Codes
without an `ErrorInfo` are gRPC's own: a message or metadata that is too large, a method that is not there, a deadline or a
cancellation that the caller's side noticed first.

| reason | code | what happened | more details |
|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Contract:
    """Files of the package, and the comment before each declaration by its full name, such as "img2img.v1.Model.id"."""

    files: Sequence[FileDescriptorProto]
    comments: dict[str, str] = field(default_factory=dict)


def build(folder: Path = REPOSITORY / "protos") -> FileDescriptorSet:
    """The .proto files of a folder, compiled by buf, with their comments. CalledProcessError where they do not compile."""
    with tempfile.TemporaryDirectory() as made:
        image = Path(made) / "image.binpb"
        buf = Path(sys.executable).parent / "buf"
        subprocess.run([buf, "build", folder, "--as-file-descriptor-set", "--output", image], check=True)
        return FileDescriptorSet.FromString(image.read_bytes())


def read(image: FileDescriptorSet) -> Contract:
    """The contract in an image that has source information."""
    known = {file.name: file for file in image.file}
    contract = Contract([known[name] for name in _FILES])
    for file in contract.files:
        names = {path: f"{file.package}.{name}" for path, name in _paths(file)}
        for location in file.source_code_info.location:
            if (name := names.get(tuple(location.path))) is not None:
                paragraphs = re.split(r"\n\s*\n", location.leading_comments)
                contract.comments[name] = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    return contract


def _paths(file: FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    """Where SourceCodeInfo has the comment of each declaration: numbers of descriptor.proto's fields, and places in them."""
    parts: Sequence[tuple[int, Sequence[Any], int, str]] = (
        (4, file.message_type, 2, "field"),
        (5, file.enum_type, 2, "value"),
        (6, file.service, 2, "method"),
    )
    for number, declared, inner, name_of in parts:
        for place, one in enumerate(declared):
            yield (number, place), one.name
            for below, member in enumerate(getattr(one, name_of)):
                yield (number, place, inner, below), f"{one.name}.{member.name}"
    for place, message in enumerate(file.message_type):
        for below, oneof in enumerate(message.oneof_decl):
            yield (4, place, 8, below), f"{message.name}.{oneof.name}"


def error_classes(error: type[errors.ServerError] = errors.ServerError) -> Iterator[type[errors.ServerError]]:
    """Every error that a caller may get, parents before children."""
    yield error
    for below in error.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from error_classes(below)


def reasons() -> dict[str, str]:
    """gRPC's code by the reason, for every error that a caller may get."""
    return {error.reason: error.status for error in error_classes()}


def broken_reasons() -> list[str]:
    """Reasons of the last release, if there was one, that are gone or have another code."""
    promised = json.loads(RELEASED_REASONS.read_text(encoding="utf-8")) if RELEASED_REASONS.exists() else {}
    today = reasons()
    return [reason for reason, status in promised.items() if today.get(reason) != status]


def page(contract: Contract) -> str:
    """The whole of docs/api.md."""
    services = [service for file in contract.files for service in file.service]
    messages = [message for file in contract.files for message in file.message_type]
    enums = [enum for file in contract.files for enum in file.enum_type]
    parts = [_HEAD, _contents(services, messages, enums)]
    parts += [_service(service, contract) for service in services]
    parts += [f"## {message.name}\n\n{_message(message, contract)}" for message in messages]
    parts += [f"## {enum.name}\n\n{_enum(enum, contract)}" for enum in enums]
    return "\n".join([*parts, _errors()])


def _contents(
    services: Sequence[ServiceDescriptorProto], messages: Sequence[DescriptorProto], enums: Sequence[EnumDescriptorProto]
) -> str:
    lines = []
    for title, declared in (("Services", services), ("Messages", messages), ("Enums", enums)):
        lines.append(f"- {title}: {', '.join(_link(one.name) for one in declared)}")
    return "\n".join([*lines, "- [Errors](#errors)", ""])


def _service(service: ServiceDescriptorProto, contract: Contract) -> str:
    comment = contract.comments[f"{PACKAGE}.{service.name}"]
    methods = "\n".join(_method(service, method, contract) for method in service.method)
    return f"## {service.name}\n\n{comment}\n\n{methods}"


def _method(service: ServiceDescriptorProto, method: MethodDescriptorProto, contract: Contract) -> str:
    asked = ("stream of " if method.client_streaming else "") + _link(_short(method.input_type))
    told = ("stream of " if method.server_streaming else "") + _link(_short(method.output_type))
    comment = contract.comments[f"{PACKAGE}.{service.name}.{method.name}"]
    return f"### {service.name}.{method.name}\n\n{asked} to {told}\n\n{comment}\n"


def _message(message: DescriptorProto, contract: Contract) -> str:
    name = f"{PACKAGE}.{message.name}"
    if not message.field:
        return f"{contract.comments[name]} It has no fields.\n"
    rows = []
    for one in message.field:
        text, default = split_default(contract.comments[f"{name}.{one.name}"])
        rows.append(f"| `{one.name}` | {one.number} | {_type(message, one)} | {_cell(default)} | {_cell(text)} |")
    oneofs = [
        f"`{oneof.name}`: {contract.comments[f'{name}.{oneof.name}']}"
        for place, oneof in enumerate(message.oneof_decl)
        if any(one.oneof_index == place for one in message.field if one.HasField("oneof_index") and not one.proto3_optional)
    ]
    table = "\n".join(["| field | number | type | default | |", "|---|---|---|---|---|", *rows])
    return "\n\n".join([contract.comments[name], *oneofs, table]) + "\n"


def _enum(enum: EnumDescriptorProto, contract: Contract) -> str:
    name = f"{PACKAGE}.{enum.name}"
    rows = [f"| `{one.name}` | {one.number} | {_cell(contract.comments[f'{name}.{one.name}'])} |" for one in enum.value]
    return "\n".join([f"{contract.comments[name]}\n", "| value | number | |", "|---|---|---|", *rows, ""])


def split_default(comment: str) -> tuple[str, str]:
    """A field's comment without its "Default: ...", and what that says; empty where it says nothing."""
    found = re.search(r" ?Default: (.+?)\.(?= |$)", comment)
    return (comment, "") if found is None else (comment[: found.start()] + comment[found.end() :], found[1])


def _type(message: DescriptorProto, one: FieldDescriptorProto) -> str:
    if one.type in (FieldDescriptorProto.TYPE_MESSAGE, FieldDescriptorProto.TYPE_ENUM):
        name = _link(_short(one.type_name)) if one.type_name.startswith(f".{PACKAGE}.") else f"`{one.type_name[1:]}`"
    else:
        name = f"`{FieldDescriptorProto.Type.Name(one.type).removeprefix('TYPE_').lower()}`"
    if one.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    if one.proto3_optional:
        return f"optional {name}"
    return f"{name}, of `{message.oneof_decl[one.oneof_index].name}`" if one.HasField("oneof_index") else name


def _errors() -> str:
    rows = []
    for error in error_classes():
        # What follows the first sentence about an attribute is for who reads the code.
        meaning = (inspect.getdoc(error) or "").partition("\n\n")[0].replace("\n", " ").partition(" `")[0]
        if error is errors.ServerError:
            meaning = "The server failed on this request. The cause is in its log, under the call's `request_id`."
        rows.append(f"| `{error.reason}` | `{error.status}` | {_cell(meaning)} | {', '.join(_details(error))} |")
    return _ERRORS_HEAD + "\n".join(rows) + "\n"


def _details(error: type[errors.ServerError]) -> Iterator[str]:
    """What comes with an error beside its reason and `request_id`: that of a real one."""
    if issubclass(error, errors.InvalidField):
        made: errors.ServerError = error("image.data", "")
    elif issubclass(error, errors.Exhausted | errors.DeadlineUnmeetable):
        made = error("", 1.0)
    else:
        made = error("")
    for packed in to_status(made).details:
        info = error_details_pb2.ErrorInfo()
        if packed.Unpack(info):
            assert info.domain == DOMAIN, "every error is of our domain"
            yield from (f"metadata `{key}`" for key in sorted(info.metadata))
        for detail in _DETAILS:
            if packed.Is(detail.DESCRIPTOR):
                sometimes = (
                    " if the time is known" if issubclass(error, errors.Exhausted) and error is not errors.QueueFull else ""
                )
                yield f"`{detail.DESCRIPTOR.name}`{sometimes}"


def _short(full_name: str) -> str:
    return full_name.rpartition(".")[2]


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def _cell(text: str) -> str:
    return text.replace("\n\n", " ").replace("|", "\\|")


def main() -> int:
    """Writes the page, checks it, or prints the reasons. Returns the process's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="fail if the page says something else")
    how.add_argument("--reasons", action="store_true", help="print each error's reason and code as JSON")
    options = parser.parse_args()
    if options.reasons:
        if broken := broken_reasons():
            print(f"released, and gone or of another code now: {', '.join(broken)}", file=sys.stderr)
            return 1
        print(json.dumps(reasons(), indent=2, sort_keys=True))
        return 0
    made = page(read(build()))
    if not options.check:
        PAGE.write_text(made, encoding="utf-8")
        return 0
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made:
        print("docs/api.md is not what the .proto files and errors.py say: run scripts/api_docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

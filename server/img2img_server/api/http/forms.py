"""A request's body as a form: read within bounds of size, time and memory, and split by python-multipart as it arrives."""

import logging
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from img2img_server.api.http.exchange import ClientLeft, Receive
from img2img_server.api.transport import MAX_MESSAGE_BYTES
from img2img_server.api.wire import MAX_VALUE_BYTES
from img2img_server.codecs.pool import ImageMemory
from img2img_server.errors import DeadlineExpired, InvalidField, MalformedMessage, MessageTooLarge
from img2img_server.support.call import Call
from img2img_server.support.cancellation import time_limit

MAX_PARTS = 64
"""Maximum parts of a form: twice the number of fields."""
MAX_PART_HEADERS, MAX_PART_HEADER_BYTES = 8, 4096
_STEP = 256 * 2**10
"""Bytes of the steps in which a body's memory is accounted for. Small bodies are not counted."""
_BODY_SECONDS, _BYTES_PER_SECOND = 60.0, 64 * 2**10
"""The timeout of a body: fixed seconds, plus one second per this many bytes."""
_FILES = ("image", "image[]", "mask", "control_image", "control_image[]", "prompt_image", "prompt_image[]")
"""Fields that may contain a file."""

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it logs a warning for each malformed body


@dataclass(slots=True)
class Part:
    """A field of a form. `is_file` is set if the part has a file name."""

    name: str
    is_file: bool
    data: bytearray = field(default_factory=bytearray)

    @property
    def text(self) -> str:
        """The value as text. Raises InvalidField if it is not UTF-8."""
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidField(self.name, f"the text is not valid UTF-8 at byte {error.start}") from None


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """The maximum `size` of a body in bytes, and its timeout: `seconds`, plus one for each 64 KiB."""

    size: int
    seconds: float = _BODY_SECONDS


async def read_form(
    headers: dict[str, str], receive: Receive, call: Call, memory: ImageMemory, held: ExitStack, limits: BodyLimits
) -> list[Part]:
    """The fields of a multipart/form-data body. `memory` accounts for its bytes until `held` is closed.

    A body that declares too large a size is refused before it is read. Raises MalformedMessage, MessageTooLarge, InvalidField,
    ImageMemoryFull, DeadlineExpired or ClientLeft.
    """
    boundary = _boundary(headers.get("content-type", ""))
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise MalformedMessage("compressed bodies are not supported: send the body without Content-Encoding")
    size = _declared(headers.get("content-length"), limits.size)
    seconds = limits.seconds + size / _BYTES_PER_SECOND
    form = _Form(boundary)
    async with (
        time_limit(seconds, lambda: DeadlineExpired(f"the body was not received within {seconds:.0f} s")),
        aclosing(_chunks(receive, call, memory, held, limits.size)) as chunks,
    ):
        async for chunk in chunks:
            form.write(chunk)
    return form.end()


async def _chunks(receive: Receive, call: Call, memory: ImageMemory, held: ExitStack, most: int) -> AsyncGenerator[bytes, None]:
    received = accounted = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        chunk: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        received += len(chunk)
        if received > most:
            raise _too_large(most)
        while received > accounted + MAX_MESSAGE_BYTES:
            held.enter_context(memory.hold(call, _STEP))
            accounted += _STEP
        if chunk:
            yield chunk


def _declared(length: str | None, most: int) -> int:
    """The size of a body from its Content-Length; `most` without one."""
    if length is None:
        return most
    if not (length.isascii() and length.isdigit()):
        raise MalformedMessage("the header Content-Length is not a number")
    size = int(length[:20])
    if size > most:
        raise _too_large(most)
    return size


def _too_large(most: int) -> MessageTooLarge:
    return MessageTooLarge(f"the body is larger than {most} bytes, the maximum: send a smaller image")


def _too_many_parts() -> MalformedMessage:
    return MalformedMessage(f"the form has more than {MAX_PARTS} fields")


def _boundary(content_type: str) -> bytes:
    kind, parameters = parse_options_header(content_type)
    if kind.lower() != b"multipart/form-data":
        raise MalformedMessage("the body must be multipart/form-data: send the image and the other fields as parts of a form")
    if not (boundary := parameters.get(b"boundary", b"")):
        raise MalformedMessage("the header Content-Type has no boundary: let your HTTP library set it")
    return boundary


class _Form:
    """Collects the parts of a body. Raises MalformedMessage or InvalidField as soon as a bound is exceeded."""

    def __init__(self, boundary: bytes) -> None:
        self._parts: list[Part] = []
        self._name = self._value = b""
        self._disposition = b""
        self._ended = False
        self._delimiter, self._delimiters = b"\r\n--" + boundary, 0
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._take_name,
                    "on_header_value": self._take_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._take_data,
                    "on_end": self._end,
                },
                max_header_count=MAX_PART_HEADERS,
                max_header_size=MAX_PART_HEADER_BYTES,
            )
        except FormParserError as error:
            raise MalformedMessage(f"the header Content-Type has a boundary that is not valid: {error}") from None

    def write(self, chunk: bytes) -> None:
        """Parses the next bytes of the body."""
        self._delimiters += chunk.count(self._delimiter)
        if self._delimiters > MAX_PARTS + 1:  # including those that start no part: they cost the parser as much
            raise _too_many_parts()
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise MalformedMessage(f"the body is not valid multipart/form-data: {error}") from None

    def end(self) -> list[Part]:
        """The parts of the complete body."""
        if not self._ended:
            raise MalformedMessage("the body is not valid multipart/form-data: it ends before its last boundary")
        return self._parts

    def _begin(self) -> None:
        if len(self._parts) >= MAX_PARTS:
            raise _too_many_parts()
        self._disposition = b""

    def _take_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _take_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name = self._value = b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise MalformedMessage("a part of the form has no name in its Content-Disposition")
        self._parts.append(Part(options[b"name"].decode("utf-8", "replace"), b"filename" in options))

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        part = self._parts[-1]
        size = len(part.data) + end - start
        if size > MAX_VALUE_BYTES and part.name not in _FILES:
            raise InvalidField(shown(part.name), f"the field has more than {MAX_VALUE_BYTES} bytes, the maximum")
        part.data += data[start:end]

    def _end(self) -> None:
        self._ended = True


def shown(name: str) -> str:
    """A client's text, shortened and printable, for an error message."""
    plain = "".join(character if character.isprintable() else "?" for character in name)
    return plain if len(plain) <= 64 else f"{plain[:64]}..."

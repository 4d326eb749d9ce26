"""Shared by tests of the HTTP front: a server that has one, OpenAI's client, plain requests, and misbehaving connections."""

import base64
import contextlib
import http.client
import io
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import openai
from img2img_server.models.registry import ModelRegistry
from messages import png
from PIL import Image
from running import RunningServer, running, store

PATIENCE = 60
BOUNDARY = "boundary-of-the-tests"
EDITS, VARIATIONS = "/v1/images/edits", "/v1/images/variations"

Field = tuple[str, bytes | str]


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response that has been read."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.json["error"]
        assert found.keys() == {"message", "type", "param", "code"}, "OpenAI's form"
        return found

    @property
    def events(self) -> list[tuple[str, Any]]:
        """Server-sent events, by name."""
        blocks = self.body.decode().split("\n\n")
        assert blocks.pop() == "", "an event ends with an empty line"
        lines = [block.split("\n") for block in blocks]
        return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in lines]


@contextlib.contextmanager
def serving(**settings: Any) -> Iterator[RunningServer]:
    """A server with an HTTP port; its models are `pipelines` by their ids, or those of `load`."""
    pipelines = settings.pop("pipelines", {})
    load = settings.pop("load", None)

    def made() -> ModelRegistry:
        found: ModelRegistry = store(**pipelines) if load is None else load()
        return found

    with running(made, **{"http_port": 0, **settings}) as server:
        yield server


def port_of(server: RunningServer) -> int:
    found = server.server.http_port
    assert found is not None
    return found


@contextlib.contextmanager
def client_of(server: RunningServer, **settings: Any) -> Iterator[openai.OpenAI]:
    """OpenAI's client, unchanged, without retries."""
    base = f"http://localhost:{port_of(server)}/v1"
    with openai.OpenAI(**{"base_url": base, "api_key": "none", "max_retries": 0, "timeout": PATIENCE, **settings}) as client:
        yield client


def form(*fields: Field, image: bytes | None = b"", boundary: str = BOUNDARY) -> bytes:
    """A multipart body. `image` is the file of that field: a plain image by default, None for no such field."""
    if image is not None:
        fields = (("image", image or png()), *fields)
    parts = []
    for name, value in fields:
        file = '; filename="image.png"' if isinstance(value, bytes) else ""
        data = value if isinstance(value, bytes) else value.encode()
        parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + data + b"\r\n")
    return b"".join(parts) + f"--{boundary}--\r\n".encode()


def typed(headers: Mapping[str, str] | None = None) -> dict[str, str]:
    """Headers of a form."""
    return {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}", **(headers or {})}


def ask(
    server: RunningServer, path: str, *fields: Field, headers: Mapping[str, str] | None = None, image: bytes | None = b""
) -> Answer:
    """Sends a form and reads the answer."""
    return send(server, "POST", path, form(*fields, image=image), typed(headers))


def get(server: RunningServer, path: str, headers: Mapping[str, str] | None = None) -> Answer:
    return send(server, "GET", path, None, headers or {})


def send(server: RunningServer, verb: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
    connection = http.client.HTTPConnection("localhost", port_of(server), timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request(verb, path, body, dict(headers))
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, response.read())


@contextlib.contextmanager
def connection(server: RunningServer) -> Iterator[socket.socket]:
    """A connection to write anything to."""
    with socket.create_connection(("localhost", port_of(server)), timeout=PATIENCE) as made:
        yield made


def head(*lines: str, verb: str = "POST", path: str = EDITS) -> bytes:
    """A request's line and headers."""
    return "\r\n".join((f"{verb} {path} HTTP/1.1", "Host: test", *lines, "", "")).encode()


def head_of(body: bytes, *lines: str) -> bytes:
    """The line and the headers of a form."""
    return head(f"Content-Type: multipart/form-data; boundary={BOUNDARY}", f"Content-Length: {len(body)}", *lines)


def rest_of(connected: socket.socket) -> bytes:
    """All data until either side closes the connection."""
    data = bytearray()
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while block := connected.recv(65536):
            data += block
    return bytes(data)


def answer_of(connected: socket.socket) -> Answer:
    """The next answer on a connection."""
    response = http.client.HTTPResponse(connected)
    response.begin()
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def opened(b64: str | None) -> Image.Image:
    """The image of a result."""
    assert b64 is not None
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def names_of(events: Sequence[tuple[str, Any]]) -> list[str]:
    return [name for name, _ in events]

"""The HTTP front, given any bytes: its connection, application and forms, on an event loop of its own and without sockets."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from fuzz_parts import seeds
from fuzz_parts.rpcs import MOST_TEXT, SECRET, Finding

BOUNDARY = "fuzz"
_MOST_BODY = 2**16
_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
STATUSES = {200, 400, 401, 404, 405, 413, 429, 431, 503, 504}
"""The allowed statuses; a 500 is a bug."""


def form(**fields: str | bytes) -> bytes:
    """A form of these fields; bytes are files."""
    parts = []
    for name, value in fields.items():
        file = '; filename="a.png"' if isinstance(value, bytes) else ""
        data = value if isinstance(value, bytes) else value.encode()
        parts.append(f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + data + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def forms() -> list[bytes]:
    """Bodies to begin with."""
    image = seeds.image_file()
    return [
        form(image=image, prompt="a lake"),
        form(image=image, prompt="a lake", model="m", n="2", size="16x16", quality="low", stream="true", partial_images="2"),
        form(
            image="data:,", prompt="p", strength="0.5", num_inference_steps="3", guidance_scale="2.5", seed="7", scheduler="Euler"
        ),
        form(image=image, prompt="p", output_format="webp", output_compression="80", response_format="url", mask=image),
        form(image=image, prompt="p", controls="a:0.5:0:0.5", control_image=image, loras="b:0.5", fidelity="fast"),
        form(
            image=image,
            prompt="p",
            controls='[{"model": "a", "image": "data:,", "scale": 2}, {"model": "b"}]',
            control_image=image,
        ),
        form(image=image, prompt="p", image_prompts="a:0.5", prompt_image=image),
        form(image=image, prompt="p", image_prompts='[{"adapter": "a", "images": ["data:,"], "scale": 2}]'),
    ]


def requests() -> list[bytes]:
    """The beginnings of connections."""
    paths = (b"/health", b"/ready", b"/v1/models", b"/v1/models/m", b"/openapi.json", b"/no")
    made = [b"GET %s HTTP/1.1\r\nHost: a\r\n\r\n" % path for path in paths]
    for body in forms():
        head = f"POST /v1/images/edits HTTP/1.1\r\nHost: a\r\nContent-Type: {_TYPE}\r\n"
        chunked = b"".join(b"%x\r\n%s\r\n" % (len(body[at : at + 100]), body[at : at + 100]) for at in range(0, len(body), 100))
        made.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        made.append(f"{head}Transfer-Encoding: chunked\r\nX-Request-Timeout: 5\r\n\r\n".encode() + chunked + b"0\r\n\r\n")
    return made


class Transport(asyncio.Transport):
    """A connection's transport, in memory."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 4711), "sockname": ("127.0.0.1", 80)})
        self.written = bytearray()
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Stores written data."""
        self.written += data

    def is_closing(self) -> bool:
        """Whether the connection was ended."""
        return self._closing

    def close(self) -> None:
        """Ends the connection."""
        self._closing = True

    def abort(self) -> None:
        """Ends the connection."""
        self._closing = True

    def pause_reading(self) -> None:
        """Does nothing: the test sends all data."""

    def resume_reading(self) -> None:
        """Does nothing: the test sends all data."""


class Transforms:
    """Replaces ImageToImageService: checks the request, and returns its own image."""

    async def transform(self, request: Any, context: Any, accept: Callable[[Any], object], reading: Any = None) -> Any:
        """The result of a request."""
        from img2img_server.engine.interface import Accepted
        from img2img_server.engine.request import Ticket

        request.SerializeToString()  # whatever was set can be sent
        context.time_remaining()
        accept(Accepted(Ticket.__new__(Ticket), 0, None))
        return _result(request)

    async def TransformStream(self, request: Any, context: Any, reading: Any = None) -> Any:
        """The events of a request."""
        from img2img.v1 import image_to_image_pb2 as pb

        yield pb.TransformStreamResponse(queued=pb.Queued(position=1, eta_seconds=2.5))
        yield pb.TransformStreamResponse(progress=pb.Progress(step=1, step_count=2, preview=b"jpeg"))
        yield pb.TransformStreamResponse(completed=await self.transform(request.request, context, lambda accepted: None))


def _result(request: Any) -> Any:
    from img2img.v1 import image_to_image_pb2 as pb

    image = pb.ImageResult(data=request.image.data, format=pb.OUTPUT_FORMAT_PNG, width=8, height=8, seed=1)
    return pb.TransformResponse(images=[image], model_id=request.model.path, engine="fake")


class Models:
    """Replaces ModelService: it has one model."""

    async def ListModels(self, request: Any, context: Any) -> Any:
        """The model."""
        from img2img.v1 import model_pb2 as pb

        return pb.ListModelsResponse(models=[pb.Model(id="m")])

    async def GetModel(self, request: Any, context: Any) -> Any:
        """The model, whatever its name."""
        from img2img.v1 import model_pb2 as pb

        return pb.GetModelResponse(model=pb.Model(id=request.id))


class _Admission:
    """Replaces the engine: its queue is never full."""

    def reserve(self, client: str) -> contextlib.AbstractContextManager[None]:
        """A slot."""
        return contextlib.nullcontext()


def connection(stack: contextlib.ExitStack) -> Callable[[bytes], None]:
    """Sends bytes over a connection. The answer must be HTTP with an allowed status and JSON."""
    from img2img_server.access.access import Access
    from img2img_server.api.health import HealthServicer
    from img2img_server.api.http.connection import Connection, Limits
    from img2img_server.api.http.front import HttpFront
    from img2img_server.api.transport import Readers
    from img2img_server.codecs.pool import ImageMemory
    from img2img_server.config import ServerConfig, TelemetrySettings
    from img2img_server.images import ImageLimits
    from img2img_server.telemetry.telemetry import Telemetry

    loop = asyncio.new_event_loop()
    stack.callback(loop.close)
    config = ServerConfig(Path(SECRET), http_port=0, image_limits=ImageLimits(max_bytes=_MOST_BODY))
    services: Any = Transforms(), Models(), None, _Admission(), ImageMemory(2**24)

    async def make() -> Callable[[], Connection]:
        telemetry = Telemetry(TelemetrySettings())
        front = HttpFront(config, Access(), telemetry, Readers(60.0), HealthServicer(), Limits(10))
        front.serve(*services)
        return front.connection

    made = loop.run_until_complete(make())

    async def attempt(data: bytes) -> bytes:
        one, transport = made(), Transport()
        one.connection_made(transport)
        one.data_received(data)
        for _ in range(100):  # turns of the loop, in which whatever can be answered is
            await asyncio.sleep(0)
        tasks = list(one.tasks)
        one.connection_lost(None)
        await asyncio.gather(*tasks)
        return bytes(transport.written)

    def check(data: bytes) -> None:
        answered = loop.run_until_complete(attempt(data))
        for part in answered.split(b"HTTP/1.1 ")[1:]:
            _check_answer(part)

    return check


def _check_answer(part: bytes) -> None:
    """Raises Finding for an answer that no request may get."""
    status, (head, _, body) = int(part[:3]), part.partition(b"\r\n\r\n")
    if status == 100:
        return
    if status not in STATUSES:
        raise Finding(f"status {status}: {part[:300]!r}")
    for secret in (SECRET.encode(), b"Traceback", b".py", b"site-packages"):
        if secret in body:
            raise Finding(f"a response reveals internals of the server: {body[:300]!r}")
    if status >= 400 and b"application/json" in head and status != 503:
        error = json.loads(body)["error"]
        if len(error["message"]) > MOST_TEXT or error.keys() != {"message", "type", "param", "code"}:
            raise Finding(f"not an error in OpenAI's form: {body[:300]!r}")


def body(stack: contextlib.ExitStack) -> Callable[[bytes], None]:
    """Tries bytes as a form, whole and in pieces: both are the same, or one is refused (a preamble may be cut in two)."""
    from img2img_server.api.http import fields
    from img2img_server.api.http.forms import BodyLimits, read_form
    from img2img_server.codecs.pool import ImageMemory
    from img2img_server.errors import ServerError
    from img2img_server.support.call import Call

    loop = asyncio.new_event_loop()
    stack.callback(loop.close)
    memory = ImageMemory(2**24)

    async def read(data: bytes, cut: int) -> Any:
        pieces = [data[at : at + cut] for at in range(0, len(data), cut)] or [b""]

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

        with contextlib.ExitStack() as held:
            limits = BodyLimits(_MOST_BODY)
            return await read_form({"content-type": _TYPE}, receive, Call("m", "r"), memory, held, limits)

    def outcome(work: Coroutine[Any, Any, Any]) -> Any:
        try:
            return loop.run_until_complete(work)
        except ServerError as error:
            return error.reason

    def attempt(data: bytes) -> None:
        parts, pieces = outcome(read(data, 2**16)), outcome(read(data, 7))
        if not isinstance(parts, str):
            assert isinstance(pieces, str) or parts == pieces, "a form is the same however it arrives"
            for variation in (False, True):
                with contextlib.suppress(ServerError):
                    fields.read(parts, variation).message.SerializeToString()
        if memory.held:
            raise Finding("the memory of a body is not given back")

    return attempt

"""One HTTP request and its response over ASGI: headers, deadline, and writes with a timeout for slow readers."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from typing import Any, TypeVar

from img2img_server.api.http import errors
from img2img_server.api.interceptors import REQUEST_ID
from img2img_server.api.transport import Readers
from img2img_server.errors import InvalidField, ServerError

_T = TypeVar("_T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

TIMEOUT = "x-request-timeout"
ABORT = "img2img.abort"
"""The ASGI extension that ends a connection at once (connection.py)."""
_PIECE = 64 * 2**10
"""Maximum bytes of one write: the same as uvicorn's limit of unsent bytes."""
JSON, EVENTS = "application/json", "text/event-stream; charset=utf-8"


class ClientLeft(Exception):
    """The client closed the connection before the response was complete."""


class Exchange:
    """A request and its response. `client` is the name that Readers limits: set it after authentication."""

    def __init__(self, scope: Mapping[str, Any], receive: Receive, send: Send, readers: Readers) -> None:
        self.receive = receive
        self.metadata = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        self.headers = dict(self.metadata)
        self.path: dict[str, str] = scope.get("path_params", {})
        self.began = time.monotonic()
        self.client = ""
        self.request_id = ""
        self.seconds: float | None = None
        self._scope, self._send, self._readers = scope, send, readers
        self._started = self._events = False

    @property
    def peer(self) -> str:
        """The caller's address in gRPC's form, such as "ipv4:127.0.0.1:4711": limits per client span both fronts."""
        host, port = self._scope["client"] or ("", 0)
        host = host.removeprefix("::ffff:") if "." in host else host
        return f"ipv6:%5B{host}%5D:{port}" if ":" in host else f"ipv4:{host}:{port}"

    @property
    def base(self) -> str:
        """The address of this server as the client wrote it."""
        server, port = self._scope["server"] or ("localhost", 0)
        return f"{self._scope['scheme']}://{self.headers.get('host') or f'{server}:{port}'}"

    def read_timeout(self) -> float | None:
        """The timeout that the client sent, in seconds; None without one. Raises InvalidField."""
        if (text := self.headers.get(TIMEOUT)) is None:
            return None
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not (math.isfinite(seconds) and seconds > 0):
            raise InvalidField(TIMEOUT, "the header must be a number of seconds above 0, such as 30")
        self.seconds = seconds
        return seconds

    def time_remaining(self) -> float | None:
        """Seconds until the deadline, None without one. Services call it as on a gRPC context."""
        return None if self.seconds is None else self.began + self.seconds - time.monotonic()

    async def while_connected(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Runs `work`. Cancels it and raises ClientLeft if the client disconnects. Call it after the body was read."""
        task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(self._left())
        try:
            await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientLeft
            return task.result()
        finally:
            for one in (task, leaving):
                one.cancel()
            await asyncio.gather(task, leaving, return_exceptions=True)

    async def answer(self, status: int, body: bytes, headers: Mapping[str, str], kind: str = JSON) -> None:
        """Writes a complete response. Raises ReaderTooSlow."""

        async def write() -> None:
            await self.begin(status, {**headers, "content-length": str(len(body))}, kind)
            await self._write(body, more=False)

        await self._readers.within(write(), len(body), self.client)

    async def begin(self, status: int, headers: Mapping[str, str], kind: str) -> None:
        """Writes the status and headers of a response."""
        self._started, self._events = True, kind == EVENTS
        pairs = {"content-type": kind, **headers}
        if self.request_id:
            pairs[REQUEST_ID] = self.request_id
        encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    async def write(self, body: bytes, more: bool = True) -> None:
        """Writes a part of the body. Raises ReaderTooSlow."""
        await self._readers.within(self._write(body, more), len(body), self.client)

    async def fail(self, error: ServerError) -> None:
        """Sends an error: as the response, as the last event of a stream, or by aborting the connection."""
        if not self._started:
            await self.answer(errors.status_of(error), errors.body_of(error), errors.headers_of(error))
        elif self._events:
            await self.write(event("error", errors.body_of(error)), more=False)
        else:
            await self.abort()

    async def abort(self) -> None:
        """Aborts the connection."""
        self._scope["extensions"][ABORT]()
        await self._left()

    async def _write(self, body: bytes, more: bool) -> None:
        view = memoryview(body)
        for start in range(0, max(1, len(body)), _PIECE):
            last = start + _PIECE >= len(body)
            piece = bytes(view[start : start + _PIECE])
            await self._send({"type": "http.response.body", "body": piece, "more_body": more or not last})

    async def _left(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass


def event(name: str, data: bytes) -> bytes:
    """A server-sent event of one line of JSON. https://html.spec.whatwg.org/multipage/server-sent-events.html"""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), data)

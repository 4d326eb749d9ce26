"""One HTTP connection: uvicorn's protocol with bounds on what a client may send and on how long it may take.

uvicorn parses whatever has arrived at once, without a bound on headers, chunks, pipelined requests or time. Here the data is
parsed in slices, a body only once the application asks for it, and each phase of a connection ends in time.
"""

import asyncio
import json
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

_log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 16 * 2**10
"""Maximum bytes of a request's line and headers, like MAX_METADATA_BYTES of a gRPC call."""
MAX_HEADERS = 100
"""Headers of a request."""
MAX_CHUNKS, BYTES_PER_CHUNK = 1024, 256
"""Chunks of a body: so many, and one more for each so many bytes."""
_SLICE = 64 * 2**10
"""Bytes that are parsed in one turn of the event loop: 1 ms at most, with the bounds above."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The maximum number of open `connections`, and timeouts in seconds: to receive a request's headers, to receive the rest of a
    body after an early response, between two requests, and to send the end of a response."""

    connections: int
    headers: float = 20.0
    rest: float = 5.0
    idle: float = 60.0
    unsent: float = 60.0


class _Refused(Exception):
    """The reason why parsing stops, with the HTTP status of the response."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Flow(FlowControl):
    """uvicorn's flow control. It also resumes parsing."""

    def __init__(self, transport: asyncio.Transport, resumed: Callable[[], None]) -> None:
        super().__init__(transport)
        self._resumed = resumed

    def resume_reading(self) -> None:
        """Resumes reading and parsing."""
        super().resume_reading()
        self._resumed()


class Connection(HttpToolsProtocol):
    """Answers requests one after the other with uvicorn's request cycle. `lost` is called when the connection has ended."""

    def __init__(self, config: Config, state: ServerState, limits: Limits, lost: Callable[[], None]) -> None:
        super().__init__(config, state, {})
        self.logger = _log
        self.access_log = False
        self._limits, self._lost = limits, lost
        self._unparsed = bytearray()
        self._parsing: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        self._chunks = self._body_bytes = 0
        self._in_headers, self._in_body = True, False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """Waits for the first request. Aborts the connection if there are too many."""
        if len(self.connections) >= self._limits.connections:
            self.transport = transport
            transport.abort()
            return
        super().connection_made(transport)
        connected = transport.get_extra_info("socket")
        if connected is not None:  # asyncio sets it only for sockets that name their protocol
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.flow = _Flow(transport, self._resume)
        self._end_after(self._limits.headers)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancels the timer and parsing."""
        self._set_timer(None)
        if self._parsing is not None:
            self._parsing.cancel()
        self._unparsed.clear()
        super().connection_lost(exc)
        self._lost()

    def data_received(self, data: bytes) -> None:
        """Parses a slice now and the rest in later iterations of the event loop."""
        self._unset_keepalive_if_required()
        self._unparsed += data
        if self._parsing is None:
            self._parse()

    def on_message_begin(self) -> None:
        """Starts a request. A pipelined request ends the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            raise _Refused(400, "pipelined requests are not supported: wait for the response")
        self._in_headers = True
        self._header_bytes = self._chunks = self._body_bytes = 0
        self._end_after(self._limits.headers)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Adds a part of the request target."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Adds a header."""
        super().on_header(name, value)
        self._count(len(name) + len(value))
        if len(self.headers) > MAX_HEADERS:
            raise _Refused(431, f"the request has more than {MAX_HEADERS} headers")

    def on_headers_complete(self) -> None:
        """Starts the application. The body is parsed when the application receives it."""
        self._set_timer(None)
        self._in_headers, self._in_body = False, True
        super().on_headers_complete()
        self.flow.pause_reading()

    def on_chunk_header(self) -> None:
        """Limits the number of chunks: parsing one costs as much as a few hundred bytes."""
        self._chunks += 1
        if self._chunks > MAX_CHUNKS + self._body_bytes // BYTES_PER_CHUNK:
            raise _Refused(400, "the body has too many small chunks")

    def on_body(self, body: bytes) -> None:
        """Adds a part of the body. Bytes of an answered request are dropped."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Ends the request."""
        self._in_body = False
        super().on_message_complete()
        if self.cycle.response_complete:
            self._end_after(self._limits.idle)

    def on_response_complete(self) -> None:
        """Sets the timeout for sending the response, the rest of the body, or the next request."""
        super().on_response_complete()
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            self._end_after(self._limits.unsent)
        else:
            self._end_after(self._limits.rest if self._in_body else self._limits.idle)

    def send_400_response(self, msg: str) -> None:
        """Refuses invalid HTTP."""
        self._refuse(400, msg)

    def _resume(self) -> None:
        if self._unparsed and self._parsing is None:
            self._parsing = self.loop.call_soon(self._parse)

    def _parse(self) -> None:
        """Parses a slice of the received data, and schedules the next one."""
        self._parsing = None
        if self.flow.read_paused or self.transport.is_closing():
            return
        data = bytes(self._unparsed[:_SLICE])
        del self._unparsed[:_SLICE]
        begun = self._in_headers
        try:
            self.parser.feed_data(data)
            if begun and self._in_headers:  # on_header does not see a header without an end
                self._count(len(data))
        except httptools.HttpParserUpgrade:
            self.cycle.keep_alive = False  # upgrades are not supported: the request is answered as HTTP/1.1
            return
        except (_Refused, httptools.HttpParserError) as error:
            found = error if isinstance(error, _Refused) else error.__context__
            refused = found if isinstance(found, _Refused) else _Refused(400, "the request is not valid HTTP/1.1")
            self._refuse(refused.status, str(refused))
            return
        if self._unparsed and not self.flow.read_paused:
            self._parsing = self.loop.call_soon(self._parse)

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            raise _Refused(431, f"the request's line and headers have more than {MAX_HEADER_BYTES} bytes")

    def _refuse(self, status: int, message: str) -> None:
        """Answers a request that the application does not see, and closes the connection."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            error: dict[str, Any] = {"message": message, "type": "invalid_request_error", "param": None}
            body = json.dumps({"error": {**error, "code": "MALFORMED_MESSAGE"}}).encode()
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
        self._end_after(self._limits.rest)

    def _end_after(self, seconds: float) -> None:
        self._set_timer(self.loop.call_later(seconds, self.transport.abort))

    def _set_timer(self, timer: asyncio.TimerHandle | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = timer

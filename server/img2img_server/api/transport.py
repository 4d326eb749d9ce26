"""What one connection and one message may cost: bounds before a message is parsed and on unread answers."""

import asyncio
import logging
import resource
from collections import Counter
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any

from img2img_server.config import ServerConfig
from img2img_server.errors import ClientBusy, Exhausted, ReaderTooSlow

_log = logging.getLogger(__name__)

MAX_METADATA_BYTES = 16 * 2**10
"""Of a call's headers in all. A token, a request id and a trace context are 300 bytes."""
MAX_MESSAGE_BYTES = 64 * 2**10
"""Of a message that brings no image."""
_WITH_IMAGES = {
    "/img2img.v1.ImageToImageService/Transform",
    "/img2img.v1.ImageToImageService/TransformStream",
    "/inference.GRPCInferenceService/ModelInfer",
    "/inference.GRPCInferenceService/ModelStreamInfer",
}
_WITH_FILES = {"/img2img.v1.AssetService/UploadAsset"}
MAX_STREAMS = 1024
"""Calls in progress of one connection. More than the queue holds by default; the caller's gRPC holds the others back."""
MAX_PENDING_CALLS = 2**16
"""Calls that have arrived and wait for the event loop. gRPC cancels further ones: by default it begins at 1000, which a burst or
another client's resets reach while the event loop is late."""
MAX_CONNECTIONS = 4096
"""Open at a time, if the process may open as many files. Each takes a file descriptor and some 40 KB."""
_OTHER_FILES = 256
"""File descriptors that are left for models, images, assets and the log."""
HANDSHAKE_SECONDS = 20
"""In which a new connection must have said what it is."""
IDLE_SECONDS = 30 * 60
"""After which a connection without calls is closed. gRPC's clients open another when they need it."""
AGE_SECONDS = 60 * 60
"""After which a connection with TLS is closed once its calls have ended, so that who was let in by a certificate that is no
longer good, or looks at one of ours that has run out, comes through today's."""
PING_SECONDS = 10
"""The least between two keepalive pings of a client. Who pings more often is sent away: each wakes the server."""
KEEPALIVE_SECONDS, KEEPALIVE_TIMEOUT_SECONDS = 60, 20
"""How long a connection is silent before the server pings it, and has for the answer: then its calls are cancelled, as their
caller is gone without a word."""


def message_bytes(config: ServerConfig, method: str) -> int:
    """The most bytes that a message of a method may have. `method` is such as "/img2img.v1.ModelService/GetModel"."""
    if method in _WITH_IMAGES:
        return config.max_message_bytes
    return MAX_MESSAGE_BYTES + (config.image_limits.max_bytes if method in _WITH_FILES else 0)


def raise_file_limit() -> None:
    """Raises the process's limit of open files from the soft one, which is often 1024, to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if (most := max_connections()) < MAX_CONNECTIONS:
        _log.warning(
            "the limit of %d open files allows %d connections: raise the hard limit (ulimit -Hn) to allow %d",
            hard,
            most,
            MAX_CONNECTIONS,
        )


def max_connections() -> int:
    """The most connections: MAX_CONNECTIONS, fewer if the process may not open as many files, and half of those at least."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, max(soft // 2, soft - _OTHER_FILES))


def options(config: ServerConfig, keepalive: float = KEEPALIVE_SECONDS) -> list[tuple[str, int]]:
    """gRPC's channel arguments for a server. `keepalive` is KEEPALIVE_SECONDS, in seconds."""
    timeout = int(min(KEEPALIVE_TIMEOUT_SECONDS, keepalive) * 1000)
    bounds = [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # The first is where gRPC begins to refuse at random, the second where it always does: one clear bound is better.
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
        ("grpc.max_allowed_incoming_connections", max_connections()),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
        ("grpc.max_connection_idle_ms", IDLE_SECONDS * 1000),
        ("grpc.http2.min_ping_interval_without_data_ms", PING_SECONDS * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", int(keepalive * 1000)),
        # Both, as the longer of them is what counts; that of pings is a minute where nobody says otherwise.
        ("grpc.keepalive_timeout_ms", timeout),
        ("grpc.http2.ping_timeout_ms", timeout),
        # Bit 0 is "not compressed". With compression a message of 31 KiB can inflate to the largest size.
        ("grpc.compression_enabled_algorithms_bitset", 0b111 if config.accept_compression else 0b001),
        # Else a second server on the same port binds silently and takes half the calls.
        ("grpc.so_reuseport", 0),
    ]
    return bounds if config.tls.certificate is None else [*bounds, ("grpc.max_connection_age_ms", AGE_SECONDS * 1000)]


_SLOW = 5.0
"""Seconds after which a message that the client does not take counts as unread."""
_BYTES_PER_SECOND = 64 * 2**10
"""What the slowest connection that is served takes: a large result has so much more time."""
MAX_UNREAD, MAX_CLIENT_UNREAD = 256, 16
"""Calls whose client does not read, in all and of one client."""
_RETRY_SECONDS = 10.0


class Readers:
    """Knows which calls wait for their client to read. `seconds` is how long one message may be left unread, 0 for no bound.

    Beyond that the call ends; gRPC can send its status only behind the message, so the message stays in memory until the client
    reads or leaves, and the call counts until then. Used on the event loop only.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._unread: Counter[str] = Counter()

    def check(self, client: str) -> None:
        """Raises ClientBusy or Exhausted if too many calls, of this client or of all, have answers that are not read."""
        if self._unread[client] >= MAX_CLIENT_UNREAD:
            raise ClientBusy(f"this client has {MAX_CLIENT_UNREAD} calls with unread responses, the maximum", _RETRY_SECONDS)
        if self._unread.total() >= MAX_UNREAD:
            raise Exhausted(f"the server has {MAX_UNREAD} calls with unread responses, the maximum", _RETRY_SECONDS)

    async def write(self, context: Any, response: Any, client: str) -> None:
        """Sends one message. Raises ReaderTooSlow if the client does not take it in time."""
        await self.within(context.write(response), response.ByteSize(), client)

    async def within(self, writing: Awaitable[None], size: int, client: str) -> None:
        """Awaits what writes `size` bytes to a client. Raises ReaderTooSlow if the client does not take them in time."""
        limit = self._seconds + size / _BYTES_PER_SECOND if self._seconds else None
        with self._unread_after(_SLOW, client):
            try:
                async with asyncio.timeout(limit) as timeout:
                    await writing
            except TimeoutError:
                if not timeout.expired():
                    raise
                raise ReaderTooSlow(f"the client did not read a response message within {limit:.0f} s") from None

    @contextmanager
    def unread(self, client: str) -> Iterator[None]:
        """Within the block one more call of this client has an answer that is not read."""
        self._unread[client] += 1
        try:
            yield
        finally:
            self._unread[client] -= 1
            if not self._unread[client]:
                del self._unread[client]

    @contextmanager
    def _unread_after(self, seconds: float, client: str) -> Iterator[None]:
        held = self.unread(client)
        begun: list[bool] = []

        def begin() -> None:
            begun.append(True)
            held.__enter__()

        timer = asyncio.get_running_loop().call_later(seconds, begin)
        try:
            yield
        finally:
            timer.cancel()
            if begun:
                held.__exit__(None, None, None)

"""Limits on connections, messages and unread responses, so that no client can exhaust the server."""

import asyncio
import logging
import resource
from collections import Counter
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any

from img2img_server.config import ServerConfig
from img2img_server.errors import ClientBusy, Exhausted, ReaderTooSlow
from img2img_server.support.cancellation import time_limit

_log = logging.getLogger(__name__)

MAX_METADATA_BYTES = 16 * 2**10
"""Maximum total size of a call's headers. A token, a request id and a trace context take 300 bytes."""
MAX_MESSAGE_BYTES = 64 * 2**10
"""Maximum size of a message without an image."""
_WITH_IMAGES = {
    "/img2img.v1.ImageToImageService/Transform",
    "/img2img.v1.ImageToImageService/TransformStream",
    "/img2img.v1.ImageToImageService/TransformBatch",
    "/inference.GRPCInferenceService/ModelInfer",
    "/inference.GRPCInferenceService/ModelStreamInfer",
}
_WITH_FILES = {"/img2img.v1.AssetService/UploadAsset"}
MAX_STREAMS = 1024
"""Maximum calls in progress of one connection, more than the default queue. The client's gRPC holds further ones back."""
MAX_PENDING_CALLS = 2**16
"""Maximum calls that wait for the event loop; gRPC cancels further ones. Its default of 1000 is reached by bursts, or by another
client's resets, while the event loop is busy."""
MAX_CONNECTIONS = 4096
"""Maximum open connections, if the limit of open files allows. Each takes a file descriptor and about 40 KB."""
_OTHER_FILES = 256
"""File descriptors reserved for models, images, assets and the log."""
HANDSHAKE_SECONDS = 20
"""Time limit of a new connection's handshake."""
IDLE_SECONDS = 30 * 60
"""A connection without calls is closed after this time. gRPC clients reconnect when needed."""
AGE_SECONDS = 60 * 60
"""A TLS connection is closed after this time, once its calls have ended: clients reconnect with the current certificates."""
PING_SECONDS = 10
"""Minimum interval between a client's keepalive pings. Clients that ping more often are disconnected."""
KEEPALIVE_SECONDS, KEEPALIVE_TIMEOUT_SECONDS = 60, 20
"""Silence after which the server pings a connection, and the time limit of the answer. Then its calls are cancelled."""


def message_bytes(config: ServerConfig, method: str) -> int:
    """Maximum bytes of a message of `method`, such as "/img2img.v1.ModelService/GetModel"."""
    if method in _WITH_IMAGES:
        return config.max_message_bytes
    return MAX_MESSAGE_BYTES + (config.image_limits.max_bytes if method in _WITH_FILES else 0)


def raise_file_limit() -> None:
    """Raises the process's soft limit of open files, often 1024, to the hard limit."""
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
    """Maximum open connections: MAX_CONNECTIONS, or fewer if the limit of open files is low, but at least half of that limit."""
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
        # Above the first gRPC refuses at random, above the second always. Equal values make the limit deterministic.
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
        # gRPC uses the longer of both; the default of ping_timeout is a minute.
        ("grpc.keepalive_timeout_ms", timeout),
        ("grpc.http2.ping_timeout_ms", timeout),
        # Bit 0 means uncompressed. A compressed message of 31 KiB can expand to the maximum size.
        ("grpc.compression_enabled_algorithms_bitset", 0b111 if config.accept_compression else 0b001),
        # Otherwise a second server could bind the same port and receive half of the calls.
        ("grpc.so_reuseport", 0),
    ]
    return bounds if config.tls.certificate is None else [*bounds, ("grpc.max_connection_age_ms", AGE_SECONDS * 1000)]


_SLOW = 5.0
"""Seconds after which a message counts as unread."""
_BYTES_PER_SECOND = 64 * 2**10
"""The slowest supported connection: large responses get correspondingly more time."""
MAX_UNREAD, MAX_CLIENT_UNREAD = 256, 16
"""Maximum calls with unread responses, of all clients and of one."""
_RETRY_SECONDS = 10.0


class Readers:
    """Counts calls whose client does not read. `seconds` is the maximum time that a message may be unread, 0 for no limit.

    After that the call ends. gRPC sends its status only after the message, so the message stays in memory and the call counts
    until the client reads or disconnects. Used on the event loop only.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._unread: Counter[str] = Counter()

    def check(self, client: str) -> None:
        """Raises ClientBusy or Exhausted if this client, or all clients together, have too many calls with unread responses."""
        if self._unread[client] >= MAX_CLIENT_UNREAD:
            raise ClientBusy(f"this client has {MAX_CLIENT_UNREAD} calls with unread responses, the maximum", _RETRY_SECONDS)
        if self._unread.total() >= MAX_UNREAD:
            raise Exhausted(f"the server has {MAX_UNREAD} calls with unread responses, the maximum", _RETRY_SECONDS)

    async def write(self, context: Any, response: Any, client: str) -> None:
        """Sends one message. Raises ReaderTooSlow if the client does not read it in time."""
        await self.within(context.write(response), response.ByteSize(), client)

    async def within(self, writing: Awaitable[None], size: int, client: str) -> None:
        """Awaits the writing of `size` bytes to a client. Raises ReaderTooSlow if the client does not read them in time."""
        limit = self._seconds + size / _BYTES_PER_SECOND if self._seconds else None
        with self._unread_after(_SLOW, client):
            async with time_limit(
                limit, lambda: ReaderTooSlow(f"the client did not read a response message within {limit or 0:.0f} s")
            ):
                await writing

    @contextmanager
    def unread(self, client: str) -> Iterator[None]:
        """Counts one more call of this client with unread responses within the block."""
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

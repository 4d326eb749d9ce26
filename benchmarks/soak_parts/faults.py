"""Broken connections: a proxy that can reset its connections, and a client process that is killed."""

import asyncio
import contextlib
import os
import socket
import ssl
import struct
import sys
from collections.abc import AsyncIterator

from soak_parts.access import LOAD, Access
from soak_parts.process import ROOT

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of 0 seconds: closing sends a reset."""


class Proxy:
    """Forwards bytes between its own port and the server until `sever` is called. With a `context` it uses TLS to the
    server."""

    def __init__(self, port: int, context: ssl.SSLContext | None = None) -> None:
        self._port = port
        self._context = context
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.target = ""

    async def serve(self) -> asyncio.Server:
        """Starts listening."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    def sever(self) -> None:
        """Resets every connection, to both sides."""
        for writer in self._writers:
            connection: socket.socket | None = writer.get_extra_info("socket")
            if connection is None:  # already closed
                continue
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port, ssl=self._context)
        except OSError:
            writer.close()
            return
        self._writers.add(far_writer)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(_pump(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def proxy(port: int, context: ssl.SSLContext | None = None) -> AsyncIterator[Proxy]:
    """A proxy to the server on `port`. Open connections are reset at the end."""
    made = Proxy(port, context)
    server = await made.serve()
    try:
        yield made
    finally:
        server.close()
        made.sever()


async def kill_a_client(target: str, access: Access, request: bytes, seconds: float) -> None:
    """Starts a process that sends `request` several times concurrently, and kills it after `seconds`.

    Raises OSError if it could not connect.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _VICTIM, target),
        cwd=ROOT,
        env={**os.environ, "AUTHORITY": access.authority.decode(), "TOKEN": access.secrets.get(LOAD, "")},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None, "a pipe"
    assert process.stdout is not None, "a pipe"
    try:
        process.stdin.write(request)
        process.stdin.close()
        if await process.stdout.readline() != b"sent\n":
            raise OSError("the client process did not connect")
        await asyncio.sleep(seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


_VICTIM = """
import os, sys, grpc
authority, token = os.environ["AUTHORITY"].encode(), os.environ["TOKEN"]
made = grpc.ssl_channel_credentials(authority) if authority else grpc.local_channel_credentials()
channel = grpc.secure_channel(sys.argv[1], made)
metadata = [("authorization", "Bearer " + token)] if token else []
grpc.channel_ready_future(channel).result(60)
call, request = channel.unary_unary("/img2img.v1.ImageToImageService/Transform"), sys.stdin.buffer.read()
calls = [call.future(request, timeout=600, metadata=metadata) for _ in range(4)]
print("sent", flush=True)
[each.exception() for each in calls]
"""
"""A program that imports only grpc, so that it starts quickly. It runs until it is killed."""

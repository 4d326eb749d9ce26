"""Sends messages to clients, and bounds how much unread data slow clients may hold."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from img2img_server.errors import ClientBusy, Exhausted, ReaderTooSlow

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
        limit = self._seconds + response.ByteSize() / _BYTES_PER_SECOND if self._seconds else None
        with self._unread_after(_SLOW, client):
            try:
                async with asyncio.timeout(limit) as timeout:
                    await context.write(response)
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

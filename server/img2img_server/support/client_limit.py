"""A bound on something that clients hold for long, in total and for each client."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from img2img_server.errors import ClientBusy, Exhausted


class ClientLimit:
    """Limits uses of a resource: at most `total` of `what` (a plural, for errors) at a time, and at most `each` of one client.
    `retry` is in seconds.

    Used on the event loop only.
    """

    def __init__(self, what: str, total: int, each: int, retry: float) -> None:
        self._what, self._total, self._each, self._retry = what, total, each, retry
        self._held: Counter[str] = Counter()

    @contextmanager
    def held(self, client: str) -> Iterator[None]:
        """Counts one more within the block. Raises ClientBusy or Exhausted if there are too many."""
        if self._held[client] >= self._each:
            raise ClientBusy(f"this client already has {self._each} {self._what}, the maximum", self._retry)
        if self._held.total() >= self._total:
            raise Exhausted(f"the server already has {self._total} {self._what}, the maximum", self._retry)
        self._held[client] += 1
        try:
            yield
        finally:
            self._held[client] -= 1
            if not self._held[client]:
                del self._held[client]

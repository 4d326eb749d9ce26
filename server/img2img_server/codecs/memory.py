"""One account of the memory that images take on their way in: messages, uploads, fetched files and what decoding needs."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from img2img_server.errors import ImageMemoryFull
from img2img_server.support.call import Call

_RETRY = 1.0
"""Seconds after which to come back: decoding and receiving end soon."""


class ImageMemory:
    """A budget of bytes, of which `held` are accounted for now, and how many times some were `refused`. One client has half of it
    at most, so that others find some left. Used on one event loop; the numbers can be read anywhere."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.refused = 0
        self.held = 0
        self._of_calls: Counter[int] = Counter()
        self._of_clients: Counter[str] = Counter()

    @contextmanager
    def hold(self, call: Call, size: int) -> Iterator[None]:
        """Accounts for `size` bytes of `call` within the block. Raises ImageMemoryFull if there are fewer.

        What a call needs beside nothing else's of its client, or of anybody, it may always have: else a large image never could.
        """
        if not size:
            yield
            return
        own, mine = self._of_calls[id(call)], self._of_clients[call.client]
        if (self.held > own and self.held + size > self.budget) or (mine > own and mine + size > self.budget // 2):
            self.refused += 1
            raise ImageMemoryFull(f"there is no memory for {size} more bytes of images now: try again", _RETRY)
        self._add(call, size)
        try:
            yield
        finally:
            self._add(call, -size)

    def _add(self, call: Call, size: int) -> None:
        self.held += size
        self._of_calls[id(call)] += size
        self._of_clients[call.client] += size
        if not self._of_calls[id(call)]:
            del self._of_calls[id(call)]
        if not self._of_clients[call.client]:
            del self._of_clients[call.client]

"""How the asset store works on its filesystem: away from the event loop, to the end, and with errors that a caller may see."""

import asyncio
import errno
import logging
from collections.abc import Callable, Coroutine
from typing import TypeVar

from img2img_server.errors import StorageFailed
from img2img_server.support.fair_queue import FairThreads

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_THREADS = 8
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class AssetWork:
    """Threads for what blocks, shared fairly among clients, and tasks for what must not be left half done."""

    def __init__(self) -> None:
        self._threads = FairThreads(_THREADS, "img2img-assets")
        self._changes: set[asyncio.Task[object]] = set()

    async def run(self, work: Callable[..., _T], *arguments: object) -> _T:
        """Runs what blocks. Raises StorageFailed for whatever a filesystem raises, but FileNotFoundError."""
        try:
            return await self._threads.run(work, *arguments)
        except FileNotFoundError:
            raise
        except Exception as error:  # the edge to foreign filesystems, which raise what their libraries do
            _log.error("the asset store failed: %r", error)
            full = isinstance(error, OSError) and error.errno in _FULL
            raise StorageFailed(f"what keeps the assets {'is full' if full else 'cannot be read or written'}") from error

    async def finish(self, change: Coroutine[object, object, _T]) -> _T:
        """Makes a change whole, even where who waits for it is cancelled meanwhile."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changed)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Waits until what was begun is done."""
        if self._changes:
            await asyncio.wait(self._changes)
        self._threads.close()

    def _changed(self, task: asyncio.Task[object]) -> None:
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may have left: asyncio would complain that nobody asked

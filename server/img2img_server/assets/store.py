"""The asset store: clients' images, addressed by content, in any filesystem that fsspec supports."""

import asyncio
import errno
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TypeVar
from weakref import WeakValueDictionary

from img2img_server import images
from img2img_server.assets.files import AssetFiles, default_folder, open_files
from img2img_server.assets.index import Asset, AssetEntry, AssetIndex, AssetStats, Key, Reservation
from img2img_server.config import AssetSettings
from img2img_server.errors import AssetNotFound, NotSupported, StorageFailed
from img2img_server.support.fair_queue import FairThreads

_T = TypeVar("_T")

_THREADS = 8
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class AssetWork:
    """Threads for blocking calls, shared fairly among clients, and tasks for changes that must not be interrupted."""

    def __init__(self) -> None:
        self._threads = FairThreads(_THREADS, "img2img-assets")
        self._changes: set[asyncio.Task[object]] = set()

    async def run(self, work: Callable[..., _T], *arguments: object) -> _T:
        """Runs blocking work on a thread. Raises StorageFailed for every exception of the filesystem except FileNotFoundError."""
        try:
            return await self._threads.run(work, *arguments)
        except FileNotFoundError:
            raise
        except Exception as error:  # filesystems raise any exception of their libraries
            _log.error("the asset store failed: %r", error)
            full = isinstance(error, OSError) and error.errno in _FULL
            raise StorageFailed(f"asset storage {'is full' if full else 'cannot be read or written'}") from error

    async def finish(self, change: Coroutine[object, object, _T]) -> _T:
        """Runs a change to its end, even if its caller is cancelled meanwhile."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changed)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Waits for changes in progress."""
        if self._changes:
            await asyncio.wait(self._changes)
        self._threads.close()

    def _changed(self, task: asyncio.Task[object]) -> None:
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved, since asyncio warns if the caller has left


_log = logging.getLogger(__name__)

_BLOCK = 2**20
"""Bytes of one read. In an object store each read is a request."""
_HEAD = 32
"""Bytes at the start of a file that identify its format."""
_TOUCH = 60.0
"""Minimum seconds between two writes of an asset's time of use to the filesystem."""
_SWEEP = 60.0


def steady_clock(wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> Callable[[], float]:
    """A clock in seconds since 1970 that does not jump: if the system clock is set forward by a day, no asset expires early."""
    offset = wall() - monotonic()
    return lambda: monotonic() + offset


class AssetStore:
    """Stores files by the SHA-256 of their content, separately for each owner.

    Used from one event loop; filesystem calls run on threads. Every read verifies the content: a truncated or changed file is
    deleted and never returned. `clock` is in seconds since 1970; `sweep_seconds` is the interval between checks for expired
    assets.
    """

    def __init__(self, settings: AssetSettings, clock: Callable[[], float] | None = None, sweep_seconds: float = _SWEEP) -> None:
        self._settings = settings
        self._clock = clock or steady_clock()
        self._sweep_seconds = sweep_seconds
        self._index = AssetIndex(settings.quota, settings.client_quota)
        self._opened: AssetFiles | None = None
        self._locks: WeakValueDictionary[Key, asyncio.Lock] = WeakValueDictionary()
        self._uploads = self._downloads = self._expired = self._damaged = 0
        self._work = AssetWork()
        self._sweeper: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Lists the stored files and starts to delete expired ones. Raises OSError if the storage cannot be used."""
        if self._settings.url == "none":
            return
        files = await asyncio.to_thread(open_files, self._settings.url)
        try:
            await self._work.run(files.prepare, self._clock())
            for found in await self._work.run(files.found):
                self._index.adopt(found)
            self._opened = files
            await self.sweep()
        except (StorageFailed, FileNotFoundError) as error:
            raise OSError(
                f"assets: '{self._settings.url or default_folder()}' cannot be used: {error.__cause__ or error}; "
                "set another folder or URL, or 'none' to disable assets"
            ) from error
        self._sweeper = asyncio.create_task(self._keep_sweeping())

    async def close(self) -> None:
        """Stops after the writes in progress have finished."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.wait([self._sweeper])
        await self._work.close()
        self._opened = None

    @property
    def kept(self) -> bool:
        """Whether assets are enabled on this server."""
        return self._opened is not None

    @property
    def stats(self) -> AssetStats:
        """The store's current statistics."""
        return AssetStats(
            len(self._index), self._index.size, self._index.reserved, self._index.quota,
            self._uploads, self._downloads, self._expired, self._damaged,
        )  # fmt: skip

    def require(self, what: str) -> None:
        """Raises NotSupported, naming the method or field `what`, if assets are disabled on this server."""
        if not self.kept:
            raise NotSupported(f"{what}: assets are disabled on this server (its setting 'assets' is 'none')")

    @asynccontextmanager
    async def reserve(self, owner: str, size: int) -> AsyncIterator[Reservation]:
        """Reserves `size` bytes of the quota for `owner` within the block. Raises AssetQuotaFull if fewer are free."""
        if not self._index.fits(owner, size):
            await self.sweep()
        reserved = Reservation(owner)
        self._index.enlarge(reserved, size)
        try:
            yield reserved
        finally:
            self._index.release(reserved)

    def holds(self, owner: str, asset_id: str) -> bool:
        """Whether this asset is stored already, so that storing it again takes no quota."""
        return self._index.get((owner, asset_id)) is not None

    async def put(self, owner: str, data: bytes, reserved: Reservation) -> Asset:
        """Stores a file and returns after it is durable. Raises StorageFailed, and AssetQuotaFull if `reserved` is too small.

        If the caller is cancelled, the file is stored nevertheless.
        """
        asset_id = await self._work.run(_digest, data)
        size = 0 if self.holds(owner, asset_id) else len(data)
        if size > reserved.left:
            self._index.enlarge(reserved, size - reserved.left)
        reserved.left -= size  # from here on _store holds and releases these bytes
        return await self._work.finish(self._store((owner, asset_id), data, Reservation(owner, size)))

    async def find(self, owner: str, asset_id: str) -> Asset:
        """An asset's description. Counts as a use of it. Raises AssetNotFound or StorageFailed."""
        key = owner, asset_id
        entry = await self._current(key)
        with self._losing(key):
            await self._use(key, entry)
            if not entry.media_type:
                entry.media_type = _media_type(await self._work.run(self._files.read, *key, 0, _HEAD))
        return self._asset(key, entry)

    async def read(self, owner: str, asset_id: str, most: int) -> bytes | None:
        """An asset's bytes, None if there are more than `most`. Counts as a use of it.

        Raises AssetNotFound, and StorageFailed if it cannot be read or is damaged.
        """
        key = owner, asset_id
        entry = await self._current(key)
        if entry.size > most:
            return None
        with self._losing(key):
            await self._use(key, entry)
            # Reads one byte more than expected to detect a longer file.
            data: bytes = await self._work.run(self._files.read, *key, 0, entry.size + 1)
        if await self._work.run(_digest, data) != asset_id:
            await self._work.finish(self._discard(key))
            raise _is_damaged()
        self._downloads += 1
        return data

    async def stream(self, owner: str, asset_id: str) -> AsyncGenerator[bytes, None]:
        """Yields an asset in blocks of at most 1 MiB, one in memory at a time. The last is yielded only if the content is intact.

        Raises as `read` does.
        """
        key = owner, asset_id
        size = (await self._current(key)).size
        hashed = hashlib.sha256()
        for start in range(0, max(size, 1), _BLOCK):
            end = min(start + _BLOCK, size)
            with self._losing(key):
                block = await self._work.run(self._files.read, *key, start, end)
            await self._work.run(hashed.update, block)
            if end == size and hashed.hexdigest() != asset_id:
                await self._work.finish(self._discard(key))
                raise _is_damaged()
            yield block
        self._downloads += 1

    async def delete(self, owner: str, asset_id: str) -> None:
        """Deletes an asset. Raises AssetNotFound or StorageFailed."""
        key = owner, asset_id
        await self._current(key)
        await self._work.finish(self._remove(key))

    async def sweep(self) -> None:
        """Deletes expired assets. Failed deletions are retried at the next sweep."""
        for key in [key for key, entry in self._index if self._is_old(entry)]:
            try:
                await self._work.finish(self._expire(key))
            except StorageFailed:
                self._index.postpone(key)  # so that one that cannot be deleted does not block the others
                return

    async def _keep_sweeping(self) -> None:
        while True:
            await asyncio.sleep(self._sweep_seconds)
            await self.sweep()

    async def _store(self, key: Key, data: bytes, reserved: Reservation) -> Asset:
        try:
            async with self._lock(key):
                entry = await self._used_again(key)
                if entry is None:
                    self._index.cover(reserved, key, len(data))
                    await self._work.run(self._files.write, *key, data)
                    entry = self._index.enter(key, len(data), self._clock())
                entry.media_type = _media_type(data[:_HEAD])
                self._uploads += 1
                return self._asset(key, entry)
        except FileNotFoundError as error:  # the storage itself is missing
            raise StorageFailed("asset storage is not available") from error
        finally:
            self._index.release(reserved)

    async def _used_again(self, key: Key) -> AssetEntry | None:
        """The entry of a file that is already stored and intact, so that it need not be written; else None."""
        entry = await self._known(key)
        with suppress(FileNotFoundError):
            if entry is not None and await self._work.run(self._files.intact, *key):
                await self._use(key, entry)
                return entry
        return None

    async def _discard(self, key: Key) -> None:
        """Deletes a damaged asset, unless it has been stored again meanwhile."""
        async with self._lock(key):
            if self._index.get(key) is not None and not await self._work.run(self._files.intact, *key):
                _log.error("asset %s of %s is damaged: deleted", key[1], key[0])
                self._damaged += 1
                await self._drop(key)

    async def _expire(self, key: Key) -> None:
        async with self._lock(key):
            with suppress(FileNotFoundError):  # another server with the same files may have used it
                self._index.adopt(await self._work.run(self._files.look, *key))
            entry = self._index.get(key)
            if entry is not None and self._is_old(entry):
                self._expired += 1
                await self._drop(key)

    async def _remove(self, key: Key) -> None:
        async with self._lock(key):
            await self._drop(key)

    async def _drop(self, key: Key) -> None:
        with suppress(FileNotFoundError):
            await self._work.run(self._files.remove, *key)
        self._index.forget(key)

    async def _current(self, key: Key) -> AssetEntry:
        """The entry of an asset that exists and has not expired. Raises AssetNotFound."""
        entry = await self._known(key)
        if entry is not None and self._is_old(entry):
            await self._work.finish(self._expire(key))
            entry = self._index.get(key)
        if entry is None:
            raise _not_found(key)
        return entry

    async def _known(self, key: Key) -> AssetEntry | None:
        if self._index.get(key) is None:
            with suppress(FileNotFoundError):  # another server with the same files may have stored it
                self._index.adopt(await self._work.run(self._files.look, *key))
        return self._index.get(key)

    async def _use(self, key: Key, entry: AssetEntry) -> None:
        entry.used = now = self._clock()
        if now - entry.touched >= _TOUCH:
            entry.touched = now
            await self._work.run(self._files.touch, *key, now)

    def _is_old(self, entry: AssetEntry) -> bool:
        return entry.used + self._settings.max_age < self._clock()

    def _asset(self, key: Key, entry: AssetEntry) -> Asset:
        return Asset(key[1], entry.media_type, entry.size, entry.used + self._settings.max_age)

    @property
    def _files(self) -> AssetFiles:
        assert self._opened is not None, "callers have passed require()"
        return self._opened

    def _lock(self, key: Key) -> asyncio.Lock:
        """The lock of all changes to one file."""
        return self._locks.setdefault(key, asyncio.Lock())

    @contextmanager
    def _losing(self, key: Key) -> Iterator[None]:
        """Within the block, a file that another server has deleted is removed from the index. Raises AssetNotFound for it."""
        try:
            yield
        except FileNotFoundError:
            self._index.forget(key)
            raise _not_found(key) from None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _media_type(head: bytes) -> str:
    return images.media_type(head) or "application/octet-stream"


def _not_found(key: Key) -> AssetNotFound:
    return AssetNotFound(f"unknown asset '{key[1]}'")


def _is_damaged() -> StorageFailed:
    return StorageFailed("the asset was damaged and is deleted: upload it again")

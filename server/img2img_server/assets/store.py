"""Assets: images that are kept for clients, by content, in any filesystem that fsspec opens."""

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
from img2img_server.assets.index import Asset, AssetIndex, AssetStats, Entry, Key, Quota
from img2img_server.config import AssetSettings
from img2img_server.errors import AssetNotFound, NotSupported, StorageFailed
from img2img_server.support.fair_queue import FairThreads

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
            raise StorageFailed(f"asset storage {'is full' if full else 'cannot be read or written'}") from error

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


_log = logging.getLogger(__name__)

_BLOCK = 2**20
"""Bytes that are read at a time: in an object store each is a request."""
_HEAD = 32
"""Bytes that tell a file's format."""
_TOUCH = 60.0
"""Seconds between two notes on the disk that an asset is in use."""
_SWEEP = 60.0


def steady_clock(wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> Callable[[], float]:
    """Seconds since 1970 that do not jump: the time now, and what passes from now on. If the machine's clock is set forward by a
    day, no asset is a day older."""
    offset = wall() - monotonic()
    return lambda: monotonic() + offset


class AssetStore:
    """Keeps files by the SHA-256 of their content, apart for each owner.

    All of it is used from one event loop; the filesystem is on threads. What is stored is whole: what was torn or changed is
    found when it is read, deleted, and never given to anybody. `clock` is in seconds since 1970, `sweep_seconds` how often
    what is too old is looked for.
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
        """Finds out what is there, and begins to delete what is too old. Raises OSError where the place cannot be used."""
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
        """Stops, once what is being written is there."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.wait([self._sweeper])
        await self._work.close()
        self._opened = None

    @property
    def kept(self) -> bool:
        """Whether this server keeps assets."""
        return self._opened is not None

    @property
    def stats(self) -> AssetStats:
        """How it does now."""
        return AssetStats(
            len(self._index), self._index.size, self._index.reserved, self._index.quota,
            self._uploads, self._downloads, self._expired, self._damaged,
        )  # fmt: skip

    def require(self, what: str) -> None:
        """Raises NotSupported, for `what` was asked, where this server keeps no assets."""
        if not self.kept:
            raise NotSupported(f"{what}: assets are disabled on this server (its setting 'assets' is 'none')")

    @asynccontextmanager
    async def room(self, owner: str, size: int) -> AsyncIterator[Quota]:
        """Keeps `size` bytes of the quota free for `owner` within the block. Raises AssetQuotaFull where there are fewer."""
        if not self._index.fits(owner, size):
            await self.sweep()
        room = Quota(owner)
        self._index.enlarge(room, size)
        try:
            yield room
        finally:
            self._index.release(room)

    def holds(self, owner: str, asset_id: str) -> bool:
        """Whether this asset is known to be there, so that it takes no more of the quota."""
        return self._index.get((owner, asset_id)) is not None

    async def put(self, owner: str, data: bytes, room: Quota) -> Asset:
        """Stores a file, and is back when it is safe. Raises StorageFailed, and AssetQuotaFull where `room` was not enough.

        A caller that is cancelled leaves the file stored.
        """
        asset_id = await self._work.run(_digest, data)
        size = 0 if self.holds(owner, asset_id) else len(data)
        if size > room.left:
            self._index.enlarge(room, size - room.left)
        room.left -= size  # from here on they are the writing's
        return await self._work.finish(self._store((owner, asset_id), data, Quota(owner, size)))

    async def find(self, owner: str, asset_id: str) -> Asset:
        """What is known of an asset, which counts as a use of it. Raises AssetNotFound or StorageFailed."""
        key = owner, asset_id
        entry = await self._current(key)
        with self._losing(key):
            await self._use(key, entry)
            if not entry.media_type:
                entry.media_type = _media_type(await self._work.run(self._files.read, *key, 0, _HEAD))
        return self._asset(key, entry)

    async def read(self, owner: str, asset_id: str, most: int) -> bytes | None:
        """A whole asset, which counts as a use of it; None where it has more than `most` bytes.

        Raises AssetNotFound, and StorageFailed where it cannot be read or is not what was stored.
        """
        key = owner, asset_id
        entry = await self._current(key)
        if entry.size > most:
            return None
        with self._losing(key):
            await self._use(key, entry)
            # One byte more than it should have: else a longer file would look right.
            data: bytes = await self._work.run(self._files.read, *key, 0, entry.size + 1)
        if await self._work.run(_digest, data) != asset_id:
            await self._work.finish(self._discard(key))
            raise _is_damaged()
        self._downloads += 1
        return data

    async def stream(self, owner: str, asset_id: str) -> AsyncGenerator[bytes, None]:
        """An asset in blocks of at most 1 MiB, only one of which is in memory. The last one comes only if all were right.

        Raises as read does.
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
        """Deletes what is too old. What cannot be deleted now is tried again the next time."""
        for key in [key for key, entry in self._index if self._is_old(entry)]:
            try:
                await self._work.finish(self._expire(key))
            except StorageFailed:
                self._index.postpone(key)  # else one that can never be deleted would keep all behind it
                return

    async def _keep_sweeping(self) -> None:
        while True:
            await asyncio.sleep(self._sweep_seconds)
            await self.sweep()

    async def _store(self, key: Key, data: bytes, room: Quota) -> Asset:
        try:
            async with self._lock(key):
                entry = await self._used_again(key)
                if entry is None:
                    self._index.cover(room, key, len(data))
                    await self._work.run(self._files.write, *key, data)
                    entry = self._index.enter(key, len(data), self._clock())
                entry.media_type = _media_type(data[:_HEAD])
                self._uploads += 1
                return self._asset(key, entry)
        except FileNotFoundError as error:  # not the file: the place
            raise StorageFailed("asset storage is not available") from error
        finally:
            self._index.release(room)

    async def _used_again(self, key: Key) -> Entry | None:
        """The entry of a file that need not be written, as it is there and whole."""
        entry = await self._known(key)
        with suppress(FileNotFoundError):
            if entry is not None and await self._work.run(self._files.intact, *key):
                await self._use(key, entry)
                return entry
        return None

    async def _discard(self, key: Key) -> None:
        """Deletes an asset whose bytes are not what its id says, unless somebody has just stored it anew."""
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

    async def _current(self, key: Key) -> Entry:
        """The entry of an asset that is there, and not too old."""
        entry = await self._known(key)
        if entry is not None and self._is_old(entry):
            await self._work.finish(self._expire(key))
            entry = self._index.get(key)
        if entry is None:
            raise _not_found(key)
        return entry

    async def _known(self, key: Key) -> Entry | None:
        if self._index.get(key) is None:
            with suppress(FileNotFoundError):  # another server with the same files may have stored it
                self._index.adopt(await self._work.run(self._files.look, *key))
        return self._index.get(key)

    async def _use(self, key: Key, entry: Entry) -> None:
        entry.used = now = self._clock()
        if now - entry.touched >= _TOUCH:
            entry.touched = now
            await self._work.run(self._files.touch, *key, now)

    def _is_old(self, entry: Entry) -> bool:
        return entry.used + self._settings.max_age < self._clock()

    def _asset(self, key: Key, entry: Entry) -> Asset:
        return Asset(key[1], entry.media_type, entry.size, entry.used + self._settings.max_age)

    @property
    def _files(self) -> AssetFiles:
        assert self._opened is not None, "whoever gets here has passed require()"
        return self._opened

    def _lock(self, key: Key) -> asyncio.Lock:
        """One for all who change the same file."""
        return self._locks.setdefault(key, asyncio.Lock())

    @contextmanager
    def _losing(self, key: Key) -> Iterator[None]:
        """Within the block, a file that is not there any more, since somebody else deleted it, is forgotten."""
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

"""What the asset store knows of its files without looking, and how many bytes they take: no input, no output."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from img2img_server.assets.files import Found
from img2img_server.errors import AssetQuotaFull

Key = tuple[str, str]
"""An owner and an id."""


@dataclass(frozen=True, slots=True)
class Asset:
    """An image that is kept. `size` is in bytes, `expires` in seconds since 1970, unless it is used again."""

    id: str
    media_type: str
    size: int
    expires: float


@dataclass(frozen=True, slots=True)
class AssetStats:
    """How the store does. `bytes` are those of the assets, `reserved` those of what is on its way, out of `quota`; the rest are
    counts since the start: what was stored, what was read (as a source, or by a client), what grew too old, what was damaged."""

    count: int
    bytes: int
    reserved: int
    quota: int
    uploads: int
    downloads: int
    expired: int
    damaged: int


@dataclass(slots=True)
class Entry:
    """A file. `size` is in bytes; `used` is its last use, in seconds since 1970, and `touched` the last that its filesystem
    knows of; `media_type` is "" until somebody looks."""

    size: int
    used: float
    touched: float
    media_type: str = ""


class Quota:
    """Bytes of the quota, `left` of them, that are kept free for something of `owner` on its way."""

    def __init__(self, owner: str, left: int = 0) -> None:
        self.owner = owner
        self.left = left


class AssetIndex:
    """Entries by owner and id. `size` is their bytes, `reserved` those of what is on its way; both together stay below `quota`,
    and one owner's below `share` (None: no bound), but for files that another server put into the same place."""

    def __init__(self, quota: int, share: int | None = None) -> None:
        self.quota = quota
        self.size = self.reserved = 0
        self._share = share
        self._taken: Counter[str] = Counter()  # by owner: bytes of assets and of what is on its way
        self._entries: dict[Key, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[tuple[Key, Entry]]:
        return iter(list(self._entries.items()))

    def get(self, key: Key) -> Entry | None:
        """The entry of a file, if it is known."""
        return self._entries.get(key)

    def adopt(self, found: Found) -> Entry:
        """Takes over what the filesystem knows of a file. A later use that is known here stands."""
        key = found.owner, found.id
        entry = self._entries.get(key)
        if entry is None:
            return self.enter(key, found.size, found.used)
        self._count(found.owner, found.size - entry.size)
        entry.size, entry.used, entry.touched = found.size, max(entry.used, found.used), found.used
        return entry

    def enter(self, key: Key, size: int, used: float) -> Entry:
        """Notes a file that was just written."""
        self.forget(key)
        self._count(key[0], size)
        self._entries[key] = entry = Entry(size, used, used)
        return entry

    def forget(self, key: Key) -> None:
        """Notes that a file is gone."""
        entry = self._entries.pop(key, None)
        self._count(key[0], -entry.size if entry is not None else 0)

    def postpone(self, key: Key) -> None:
        """Has a file come last of all."""
        if (entry := self._entries.pop(key, None)) is not None:
            self._entries[key] = entry

    def fits(self, owner: str, size: int) -> bool:
        """Whether so many bytes more are within the quota and the owner's share of it."""
        return self.size + self.reserved + size <= self.quota and (
            self._share is None or self._taken[owner] + size <= self._share
        )

    def enlarge(self, room: Quota, size: int) -> None:
        """Keeps so many bytes more free for `room`. Raises AssetQuotaFull."""
        if not self.fits(room.owner, size):
            whose = "" if self.size + self.reserved + size > self.quota else f" within your share of {self._share} bytes"
            raise AssetQuotaFull(
                f"asset storage is full: no space for {size} more bytes{whose}; delete assets, or wait until some expire"
            )
        self._reserve(room.owner, size)
        room.left += size

    def release(self, room: Quota) -> None:
        """Gives back what is left of `room`."""
        self._reserve(room.owner, -room.left)
        room.left = 0

    def cover(self, room: Quota, key: Key, size: int) -> None:
        """Keeps so much more free that `room` and what the file has now are `size` bytes: it may have been there when room was
        made for it, and be gone. Raises AssetQuotaFull."""
        known = self._entries.get(key)
        self.enlarge(room, max(0, size - room.left - (0 if known is None else known.size)))

    def _count(self, owner: str, size: int) -> None:
        self.size += size
        self._take(owner, size)

    def _reserve(self, owner: str, size: int) -> None:
        self.reserved += size
        self._take(owner, size)

    def _take(self, owner: str, size: int) -> None:
        self._taken[owner] += size
        if not self._taken[owner]:
            del self._taken[owner]  # else owners who have nothing any more would stay for good

"""The asset store's index in memory: known files, their bytes, and the quota. Does no input or output."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from img2img_server.assets.files import Found
from img2img_server.errors import AssetQuotaFull

Key = tuple[str, str]
"""An owner and an id."""


@dataclass(frozen=True, slots=True)
class Asset:
    """A stored image. `size` is in bytes. It expires at `expires`, in seconds since 1970, unless it is used before."""

    id: str
    media_type: str
    size: int
    expires: float


@dataclass(frozen=True, slots=True)
class AssetStats:
    """The store's statistics. `bytes` of assets and `reserved` bytes of uploads in progress count against `quota`. The others are
    counts since the start: `uploads` stored, `downloads` read (as a source or by a client), `expired`, and `damaged` ones."""

    count: int
    bytes: int
    reserved: int
    quota: int
    uploads: int
    downloads: int
    expired: int
    damaged: int


@dataclass(slots=True)
class AssetEntry:
    """A file. `size` is in bytes; `used` is its last use in seconds since 1970, and `touched` the last use that its filesystem
    has recorded; `media_type` is "" until it is first needed."""

    size: int
    used: float
    touched: float
    media_type: str = ""


class Reservation:
    """`left` bytes of the quota that are reserved for a write of `owner`."""

    def __init__(self, owner: str, left: int = 0) -> None:
        self.owner = owner
        self.left = left


class AssetIndex:
    """Entries by owner and id. `size` is their bytes, `reserved` the bytes of writes in progress. Their sum stays within `quota`,
    and one owner's within `share` (None: no limit), except for files that other servers write to the same storage."""

    def __init__(self, quota: int, share: int | None = None) -> None:
        self.quota = quota
        self.size = self.reserved = 0
        self._share = share
        self._taken: Counter[str] = Counter()  # by owner: bytes of assets and of reservations
        self._entries: dict[Key, AssetEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[tuple[Key, AssetEntry]]:
        return iter(list(self._entries.items()))

    def get(self, key: Key) -> AssetEntry | None:
        """The entry of a file, if it is known."""
        return self._entries.get(key)

    def adopt(self, found: Found) -> AssetEntry:
        """Updates an entry from the filesystem. A later use that is already known is kept."""
        key = found.owner, found.id
        entry = self._entries.get(key)
        if entry is None:
            return self.enter(key, found.size, found.used)
        self._count(found.owner, found.size - entry.size)
        entry.size, entry.used, entry.touched = found.size, max(entry.used, found.used), found.used
        return entry

    def enter(self, key: Key, size: int, used: float) -> AssetEntry:
        """Adds a file that was just written."""
        self.forget(key)
        self._count(key[0], size)
        self._entries[key] = entry = AssetEntry(size, used, used)
        return entry

    def forget(self, key: Key) -> None:
        """Removes the entry of a deleted file."""
        entry = self._entries.pop(key, None)
        self._count(key[0], -entry.size if entry is not None else 0)

    def postpone(self, key: Key) -> None:
        """Moves an entry to the end of the iteration order."""
        if (entry := self._entries.pop(key, None)) is not None:
            self._entries[key] = entry

    def fits(self, owner: str, size: int) -> bool:
        """Whether `size` more bytes are within the quota and the owner's share of it."""
        return self.size + self.reserved + size <= self.quota and (
            self._share is None or self._taken[owner] + size <= self._share
        )

    def enlarge(self, reservation: Reservation, size: int) -> None:
        """Adds `size` bytes to a reservation. Raises AssetQuotaFull."""
        if not self.fits(reservation.owner, size):
            whose = "" if self.size + self.reserved + size > self.quota else f" within your share of {self._share} bytes"
            raise AssetQuotaFull(
                f"asset storage is full: no space for {size} more bytes{whose}; delete assets, or wait until some expire"
            )
        self._reserve(reservation.owner, size)
        reservation.left += size

    def release(self, reservation: Reservation) -> None:
        """Returns the unused bytes of a reservation to the quota."""
        self._reserve(reservation.owner, -reservation.left)
        reservation.left = 0

    def cover(self, reservation: Reservation, key: Key, size: int) -> None:
        """Enlarges a reservation until it and the file's present bytes are `size`: the file may have been deleted since the
        reservation was made. Raises AssetQuotaFull."""
        known = self._entries.get(key)
        self.enlarge(reservation, max(0, size - reservation.left - (0 if known is None else known.size)))

    def _count(self, owner: str, size: int) -> None:
        self.size += size
        self._take(owner, size)

    def _reserve(self, owner: str, size: int) -> None:
        self.reserved += size
        self._take(owner, size)

    def _take(self, owner: str, size: int) -> None:
        self._taken[owner] += size
        if not self._taken[owner]:
            del self._taken[owner]  # otherwise owners without files would accumulate

"""A content-addressed LRU cache with a byte budget, for results that requests can share."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counts of hits, misses and evictions, and the current entries and bytes."""

    hits: int
    misses: int
    evictions: int
    entries: int
    bytes: int


class Cache:
    """Holds values up to `budget` bytes and evicts the least recently used first. A budget of 0 disables it. Thread-safe."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._bytes = self._hits = self._misses = self._evictions = 0
        self._lock = threading.Lock()

    @property
    def stats(self) -> CacheStats:
        """The cache's current statistics."""
        return CacheStats(self._hits, self._misses, self._evictions, len(self._entries), self._bytes)

    def get(self, key: Hashable) -> Any:
        """The value stored under `key`, None if there is none."""
        with self._lock:
            if key not in self._entries:
                self._misses += 1
                return None
            self._hits += 1
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Stores `value`, which takes `size` bytes. A value larger than the budget is not stored."""
        with self._lock:
            self._bytes -= self._entries.pop(key, (None, 0))[1]
            if size > self.budget:
                return
            self._entries[key] = (value, size)
            self._bytes += size
            while self._bytes > self.budget:
                _, (_, freed) = self._entries.popitem(last=False)
                self._bytes -= freed
                self._evictions += 1

    def drop(self, unwanted: Callable[[Any], bool]) -> None:
        """Removes every entry whose key is `unwanted`."""
        with self._lock:
            for key in [key for key in self._entries if unwanted(key)]:
                self._bytes -= self._entries.pop(key)[1]

"""Reloads files when they change. An invalid change is logged once, and the previous version stays in use."""

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
Contents = tuple[bytes, ...]


class FileReloader(Generic[_T]):
    """`value` is the result of `make` for the contents returned by `read`. Thread-safe.

    Compares contents, not times or inodes, to detect files that were written in place, replaced, or swapped by a symbolic link.
    Both functions raise OSError or ValueError for invalid files; so does the constructor. `name` is used in the log.
    """

    def __init__(self, name: str, read: Callable[[], Contents], make: Callable[[Contents], _T]) -> None:
        self._name, self._read, self._make = name, read, make
        self._lock = threading.Lock()
        self._contents = read()
        self._problem = ""
        self.value = make(self._contents)

    def look(self) -> _T | None:
        """Reads the files. Returns the new value if they have changed and are valid, else None."""
        with self._lock:
            try:
                contents = self._read()
                if contents == self._contents:
                    self._problem = ""
                    return None
                value = self._make(contents)
            except (OSError, ValueError) as error:
                if str(error) != self._problem:
                    self._problem = str(error)
                    _log.error("%s: reload failed; keeping the previous version: %s", self._name, error)
                return None
            self._contents, self._problem, self.value = contents, "", value
            _log.info("%s: reloaded", self._name)
            return value
